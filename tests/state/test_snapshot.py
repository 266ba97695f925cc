"""A snapshot sees each change and puts it back; without copies it sees them too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pytest_lora.inspection.state import Damage, Snapshot, snapshot


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Sequential(nn.Linear(7, 3)))


@pytest.fixture(params=[True, False], ids=["copies", "fingerprints"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(snapshot, "COPIED_BYTES", 0)
    return bool(request.param)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "one value": lambda m: m[0].weight.data[3].add_(1e-6),
    "the sign of a zero": lambda m: m[0].bias.data.copy_(-m[0].bias.data),
    "two values exchanged": lambda m: m[0].weight.data[0].copy_(m[0].weight.data[0].flip(0)),
    "a value that is not a number": lambda m: m[0].weight.data[0, 0].fill_(float("nan")),
    "dtype": lambda m: m[0].bfloat16(),
    "shape": lambda m: setattr(m[0].weight, "data", torch.zeros(7, 6)),
    "strides": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_contents_are_damage(name: str, copied: bool) -> None:
    model = network()
    nn.init.zeros_(model[0].bias)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = Snapshot(model)
    assert state.copied is copied
    assert not state.damage()
    CHANGES[name](model)
    damage = state.damage()
    assert set(damage.contents) <= {"0.weight", "0.bias"}
    assert damage.contents
    in_place = name not in ("dtype", "shape", "strides")  # else the old memory is whole, and is taken back
    lost = state.restore(damage.differing)
    assert lost == ([] if copied or not in_place else list(damage.contents))
    if copied or not in_place:
        assert not state.damage()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
            assert torch.equal(tensor.signbit(), before[name].signbit())
            assert tensor.dtype == before[name].dtype
            assert tensor.stride() == before[name].stride()


def test_strides_that_change_in_place_are_damage(copied: bool) -> None:
    """The same values at the same address, read in another order."""
    layer = nn.Linear(4, 4)
    layer.weight.data = torch.eye(4)
    state = Snapshot(layer)
    layer.weight.data.t_()
    assert not state.damage()
    with torch.no_grad():
        layer.weight.t_()
    assert layer.weight.stride() == (1, 4)
    damage = state.damage()
    assert damage.contents == ("weight",)
    if copied:
        assert not state.restore(damage.differing)
        assert layer.weight.stride() == (4, 1)
        assert torch.equal(layer.weight, torch.eye(4))


def test_a_not_a_number_that_stays_is_no_change(copied: bool) -> None:
    model = network()
    model[0].weight.data[0, 0] = float("nan")
    assert not Snapshot(model).damage()


def test_settings_are_put_back_and_are_no_damage(copied: bool) -> None:
    model = network()
    hooked: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: hooked.append("kept"))
    model[2].eval()
    state = Snapshot(model)
    handle.remove()
    model[0].register_forward_hook(lambda *_: hooked.append("added"))
    model[0].weight.register_hook(lambda grad: hooked.append("gradient"))
    model[0].bias.requires_grad_(False)
    model[0].made_up = 1
    del model[1].eps
    model.forward = lambda x: x
    model.train()
    model[0](torch.ones(1, 5)).sum().backward()
    hooked.clear()
    assert state.damage() == Damage()
    assert not state.restore()
    assert [module.training for module in model.modules()] == [True, True, True, False, False]
    assert model[0].weight.grad is None
    model(torch.ones(2, 5)).sum().backward()
    assert hooked == ["kept"]
    assert model[0].bias.grad is not None
    assert not hasattr(model[0], "made_up")


def test_structure_is_named_and_put_back(copied: bool) -> None:
    model = network()
    first, weight = model[0], model[2][0].weight
    state = Snapshot(model)
    model[0] = nn.Linear(5, 7)
    model[2][0].weight = nn.Parameter(weight.detach().clone())
    model[2][0].register_buffer("extra", torch.zeros(1))
    model.append(nn.Tanh())
    damage = state.damage()
    assert damage.layers == ("0", "3")
    assert damage.replaced == ("2.0.weight", "2.0.extra")
    assert damage.contents == ()
    assert not state.restore(damage.differing)
    assert model[0] is first
    assert model[2][0].weight is weight
    assert len(model) == 3
    assert not hasattr(model[2][0], "extra")


def test_running_statistics_are_put_back_and_are_no_damage() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = Snapshot(model)
    model(torch.rand(4, 5))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    damage = state.damage()
    assert not damage
    assert not state.restore(damage.differing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_models_on_the_meta_device_have_no_contents() -> None:
    with torch.device("meta"):
        model = network()
    state = Snapshot(model)
    model[0].weight.requires_grad_(False)
    assert not state.damage()
    assert not state.restore()
    assert model[0].weight.requires_grad
