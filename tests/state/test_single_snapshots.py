"""What a snapshot copies, what it shares with another one, and which differences it calls damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pytest_lora.inspection.state import Snapshot, snapshot


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def test_models_up_to_a_size_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert snapshot.COPIED_BYTES == 268_435_456
    model = network()
    for room, copied in ((bytes_of(model), True), (bytes_of(model) - 1, False)):
        monkeypatch.setattr(snapshot, "COPIED_BYTES", room)
        assert Snapshot(model).copied is copied


def test_of_larger_ones_what_training_changes_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "COPIED_BYTES", 0)
    model = network()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 4)
    model[0].kept = [torch.ones(2)]
    gradient = model[0].weight.grad
    plain, trained = Snapshot(model), Snapshot(model, to_train=True)
    for state, copied in ((plain, False), (trained, True)):
        assert (state.before(model[0].weight) is not None) is copied
        assert (state.before(model[1].running_mean) is not None) is copied
        assert state.before(model[0].bias) is None
        assert state.before(model[0].kept[0]) is not None
        assert (id(gradient) in state._tensors) is copied
        assert state.before(gradient) is None  # of a gradient a fingerprint
    assert plain.before(torch.ones(1)) is None
    # What attributes and optimizers hold is always copied, with its gradient.
    held = nn.Parameter(torch.ones(2))
    held.grad = torch.ones(2)
    beside = Snapshot(model, [held], to_train=True)
    assert beside.before(held.grad) is not None
    assert id(held.grad) not in Snapshot(model, [held])._tensors
    model[0].weight.grad = None
    trained.clear_gradients()
    assert held.grad is not None
    beside.clear_gradients()
    assert held.grad is None


def test_values_are_kept_only_where_they_are_asked_for() -> None:
    model = network()
    state = Snapshot(model, values=False)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    model[0].weight.requires_grad_(False)
    assert state.before(model[0].weight) is None
    assert state.restore_all() == []
    assert torch.equal(model[0].weight, before + 1)
    assert model[0].weight.requires_grad


def test_contents_that_are_still_those_of_another_snapshot_are_left_to_it() -> None:
    model = network()
    first = Snapshot(model)
    with torch.no_grad():
        model[0].bias += 1
    model[0].flag, changed = 1, model[0].bias.detach().clone()
    second = Snapshot(model, sharing=first)
    shared = {state.name: state.is_shared for state in second._tensors.values()}
    assert [name for name, is_shared in shared.items() if not is_shared] == ["0.bias"]
    with torch.no_grad():
        model[0].bias += 1
        model[0].weight += 1
    model[0].flag, model[1].flag = 2, 2
    assert second.damage().contents == ("0.weight", "0.bias")
    assert first.restore() == []
    assert second.restore() == []
    assert torch.equal(model[0].bias, changed)
    assert torch.equal(model[0].weight, network()[0].weight)
    assert (model[0].flag, hasattr(model[1], "flag")) == (1, False)
    alone = Snapshot(model)
    assert alone._own_contents is alone._contents
    assert second._own_contents is not second._contents


class Other(nn.Linear):
    pass


def test_what_another_state_has_is_no_damage() -> None:
    model = network()
    state = Snapshot(model)
    weight = nn.Parameter(torch.ones(4, 4))
    model[0].__class__ = Other
    model[0].weight, model[0].inner = weight, nn.Linear(1, 1)
    with torch.no_grad():
        model[0].bias += 1
    allowed = Snapshot(model)
    assert state.damage().layers == ("0", "0.inner")
    assert state.damage().replaced == ("0.weight",)
    assert state.damage().contents == ("0.bias",)
    assert not state.damage(allowed)
    assert state.damage(allowed).differing == {"0.bias"}
    assert not state.damage(allowed, trained=("0.bias",)).contents
    assert state.damage(trained=(".bias",)).contents == ()
    with torch.no_grad():
        model[0].bias += 1
    assert state.damage(allowed).contents == ("0.bias",)
    model[0].weight = nn.Parameter(torch.ones(4, 4))
    model[0].__class__ = nn.Linear
    assert state.damage(allowed).replaced == ("0.weight",)
    assert state.damage(allowed).layers == ()
    model[0].__class__ = type("Third", (nn.Linear,), {})
    assert state.damage(allowed).layers == ("0",)
    assert state.restore() == []
    assert type(model[0]) is nn.Linear


def test_only_what_differs_is_compared_again_where_that_is_known() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = Snapshot(model)
    with torch.no_grad():
        model[0].bias += 1
        model[0].weight += 1
    assert state.restore(frozenset({"0.bias"})) == []
    assert torch.equal(model[0].bias, before["0.bias"])
    assert not torch.equal(model[0].weight, before["0.weight"])
    model[0].weight.requires_grad_(False)
    assert state.restore(frozenset()) == []
    assert model[0].weight.requires_grad
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert state.restore() == []
    assert torch.equal(model[0].weight, before["0.weight"])


def test_what_cannot_be_put_back_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "COPIED_BYTES", 0)
    model = network()
    state = Snapshot(model)
    with torch.no_grad():
        model[0].bias += 1
    assert state.restore() == ["0.bias"]
    assert state.restore_all() == ["0.bias"]
    assert snapshot._attempted([("a", lambda: False), ("b", lambda: None), ("c", lambda: 1 / 0)]) == [
        "a",
        "c",
    ]
    assert list(Snapshot(model[0])._modules) == [""]
    assert Snapshot(nn.Module())._modules[""][1].name == "model"


def test_tied_and_missing_tensors_are_taken_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    names = [state.name for state in Snapshot(model)._tensors.values()]
    assert names == ["0.weight", "0.bias"]
    sparse = nn.Module()
    sparse.register_buffer("held", torch.eye(2).to_sparse())
    state = Snapshot(sparse)
    assert sorted(one.name for one in state._tensors.values()) == ["held", "held._indices", "held._values"]
    assert Snapshot(None, [torch.ones(1)]).before(torch.ones(1)) is None
