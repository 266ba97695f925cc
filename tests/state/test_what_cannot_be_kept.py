"""What is hard to put back is put back all the same, refused by name before anything runs, or reported by name."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from pytest_lora import Expect, check_loss_decreases, check_training
from pytest_lora.inspection.state import Keeper, NotRestoredError, Snapshot, snapshot

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """A small model that gives a loss, with a buffer of any kind."""

    def __init__(self, buffer: torch.Tensor | None = None) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("odd", buffer)
        self.touch: Callable[[nn.Module], object] = lambda module: None

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.touch(self)
        out = self.lin(x)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def adapted(buffer: torch.Tensor | None = None) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Net(buffer), LoraConfig(r=2, target_modules=["lin"]))


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.ones(2, 4), "labels": torch.zeros(2, 4)}


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)


def _subclass() -> torch.Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(3), torch.ones(3))


KINDS: dict[str, tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], object]]] = {
    "expanded": (lambda: torch.ones(1).expand(4), lambda t: t.untyped_storage().fill_(0)),
    "expanded in rows": (
        lambda: torch.arange(3.0).expand(4, 3),
        lambda t: torch.as_strided(t, (3,), (1,)).mul_(2),
    ),
    "sliding windows": (
        lambda: torch.arange(6.0).unfold(0, 3, 1),
        lambda t: torch.as_strided(t, (6,), (1,)).mul_(2),
    ),
    "sparse COO": (lambda: torch.eye(3).to_sparse(), lambda t: t.add_(torch.ones(3, 3).to_sparse())),
    "sparse CSR": (lambda: torch.eye(3).to_sparse_csr(), lambda t: t.values().mul_(2)),
    "sparse CSC": (lambda: torch.eye(3).to_sparse_csc(), lambda t: t.values().mul_(2)),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda t: t.mul_(2),
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda t: t.values().mul_(2),
    ),
    "quantized": (_quantized, lambda t: t.copy_(torch.zeros(4))),
    "a subclass around two tensors": (_subclass, lambda t: t.a.mul_(2)),
    "conjugate": (lambda: torch.tensor([1 + 2j]).conj(), lambda t: t.mul_(2)),
    "a slice": (lambda: torch.arange(9.0)[1:8:2], lambda t: t.mul_(2)),
    "transposed": (lambda: torch.arange(6.0).reshape(2, 3).t(), lambda t: t.mul_(2)),
    "float8": (lambda: torch.ones(4).to(torch.float8_e4m3fn), lambda t: t.copy_(torch.zeros(4))),
    "a scalar": (lambda: torch.tensor(True), lambda t: t.logical_not_()),
    "empty": (lambda: torch.ones(0, 3), lambda t: t.resize_(2, 3)),
}


def _values(tensor: torch.Tensor) -> list[Any]:
    """What is in a tensor, whatever kind it is."""
    if isinstance(tensor, torch.Tensor) and tensor.is_nested:
        return [part.tolist() for part in tensor.unbind()]
    if hasattr(tensor, "a"):
        return [tensor.a.tolist(), tensor.b.tolist()]
    if tensor.is_quantized:
        return tensor.dequantize().tolist()
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return [dense.float().tolist() if not dense.is_complex() else dense.resolve_conj().tolist(), dense.shape]


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_all_kinds_come_back(kind: str) -> None:
    make, change = KINDS[kind]
    model = adapted(make())
    base = model.get_base_model()
    before, held = _values(base.odd), base.odd
    with torch.no_grad():
        base.touch = lambda module: change(module.odd)
        report = check_training(model, batch())
    assert report is not None
    assert base.odd is held
    assert _values(base.odd) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_changes_above_are_changes(kind: str) -> None:
    make, change = KINDS[kind]
    tensor = make()
    before = _values(tensor)
    change(tensor)
    assert _values(tensor) != before


def test_what_cannot_be_kept_is_refused_before_a_batch_is_taken() -> None:
    model = adapted(torch.ones(2, 2).to_mkldnn())
    batches = iter([batch()] * 3)
    with pytest.raises(ValueError, match=r"model: base_model\.model\.odd is a tensor of layout _mkldnn"):
        check_training(model, batches)
    assert len(list(batches)) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": None},
        {"model": nn.Linear(2, 2)},
        {"base_snapshot": {"no.such.weight": torch.ones(1)}},
        {"steps": 0},
        {"max_grad_norm": -1},
        {"optimizer": 3},
        {"expect": "train"},
        {"select": ["LORA9999"]},
        {"ignore": "LORA3"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
@pytest.mark.parametrize("check", [check_training, check_loss_decreases])
def test_no_batch_is_taken_for_a_refusal(check: Callable[..., Any], arguments: dict[str, Any]) -> None:
    taken = []

    def batches() -> Iterator[Any]:
        taken.append(1)
        yield batch()

    given = {"model": adapted(), "batches": batches(), **arguments}
    with pytest.raises((TypeError, ValueError)):
        check(**given)
    assert not taken


@pytest.mark.parametrize(
    ("check", "purpose", "taken"),
    [(check_training, "train", 3), (check_training, "inference", 1), (check_loss_decreases, "train", 3)],
)
def test_batches_are_taken_as_the_docstring_says(check: Callable[..., Any], purpose: Any, taken: int) -> None:
    batches = iter([batch()] * 9)
    check(adapted(), batches, steps=3, expect=Expect(purpose=purpose))
    assert len(list(batches)) == 9 - taken


CONTAINERS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "an immutable list of torch": (immutable_list([1, 2]), lambda c: list.append(c, 3)),
    "an immutable dict of torch": (immutable_dict(a=1), lambda c: dict.__setitem__(c, "b", 2)),
    "a UserDict": (UserDict(a=1), lambda c: c.update(b=2)),
    "a set in a list": ([{1}], lambda c: c[0].add(2)),
    "a list in a tuple": (([1],), lambda c: c[0].append(2)),
    "a dict in a dict": ({"a": {"b": 1}}, lambda c: c["a"].clear()),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_come_back_also_those_that_refuse_changes(kind: str) -> None:
    container, change = CONTAINERS[kind]
    model = adapted()
    model.notes = container
    before = repr(container)
    model.get_base_model().touch = lambda module: change(container)
    check_training(model, batch(), steps=1)
    assert model.notes is container
    assert repr(container) == before


@dataclass(slots=True)
class Slotted:
    """What keeps its fields outside of a dict."""

    seen: list[int]
    count: int = 0


@dataclass(frozen=True)
class Frozen:
    """Refuses changes, but for those who ask ``object``."""

    seen: list[int]
    count: int = 0


def _cache() -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    return cache


def _count(holder: Any) -> None:
    holder.seen.append(2)
    object.__setattr__(holder, "count", holder.count + 1)


HOLDERS: dict[str, tuple[Any, Callable[[Any], object], Callable[[Any], Any]]] = {
    "a dataclass with slots": (Slotted([1]), _count, repr),
    "a frozen dataclass": (Frozen([1]), _count, repr),
    "a cache of keys and values": (
        _cache(),
        lambda c: c.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 0),
        lambda c: (c.get_seq_length(), c.layers[0].keys.shape),
    ),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_what_a_model_holds_comes_back_however_it_keeps_its_fields(kind: str) -> None:
    holder, change, seen = HOLDERS[kind]
    model = adapted()
    model.notes = holder
    before = seen(holder)
    model.get_base_model().touch = lambda module: change(holder)
    check_training(model, batch(), steps=1)
    assert model.notes is holder
    assert seen(holder) == before
    change(holder)
    assert seen(holder) != before


class Stubborn(UserDict[str, int]):
    """Takes new entries, and lets none go."""

    def clear(self) -> None:
        raise PermissionError


def test_what_refuses_is_named_and_all_else_is_put_back() -> None:
    model = adapted()
    model.notes = Stubborn(a=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    model.get_base_model().touch = lambda module: model.notes.update(b=2)
    with pytest.raises(NotRestoredError, match=r"could not be put back: model\.notes; load the model anew"):
        check_training(model, batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_lies_deep_is_named_too() -> None:
    model = adapted()
    stubborn = Stubborn(a=1)
    model.notes = {"seen": [stubborn]}
    model.get_base_model().touch = lambda module: stubborn.update(b=2)
    with pytest.raises(NotRestoredError, match=r"could not be put back: model\.notes\.seen\.0; load"):
        check_training(model, batch())


def test_an_error_that_ended_the_check_says_what_was_lost_too() -> None:
    model = adapted()
    model.notes = Stubborn(a=1)

    def touch(module: nn.Module) -> None:
        model.notes["b"] = 2
        raise KeyboardInterrupt

    model.get_base_model().touch = touch
    with pytest.raises(KeyboardInterrupt) as caught:
        check_training(model, batch())
    assert "model.notes" in caught.value.__notes__[0]


def _edit(module: Any) -> None:
    module.lin.base_layer.weight.data.mul_(1.5)


def test_a_large_model_that_edits_a_frozen_weight_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "COPIED_BYTES", 0)
    model = adapted()
    base = model.get_base_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_training(model, batch())
    base.touch = _edit
    with pytest.raises(NotRestoredError, match=r"put back: base_model\.model\.lin\.base_layer\.weight;"):
        check_training(model, batch())
    after = model.state_dict()
    assert [n for n in before if not torch.equal(before[n], after[n])] == [
        "base_model.model.lin.base_layer.weight"
    ]


def test_a_model_that_is_small_enough_is_put_back() -> None:
    model = adapted()
    base = model.get_base_model()
    before = base.lin.base_layer.weight.clone()
    base.touch = _edit
    check_training(model, batch())
    assert torch.equal(base.lin.base_layer.weight, before)


OPTIMIZERS: dict[nn.Parameter, torch.optim.Optimizer] = {}


def _step_of_the_module(parameter: nn.Parameter) -> None:
    OPTIMIZERS[parameter].step()
    OPTIMIZERS[parameter].zero_grad()


class _Stepper:
    def __init__(self, optimizers: dict[nn.Parameter, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self, parameter: nn.Parameter) -> None:
        self.optimizers[parameter].step()


@pytest.mark.parametrize("holds", ["closure", "global", "method"])
def test_optimizers_that_step_in_the_backward_are_put_back(holds: str) -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    made = {p: torch.optim.AdamW([p], lr=0.1) for p in trained}
    OPTIMIZERS.clear()
    OPTIMIZERS.update(made)

    def step(parameter: nn.Parameter) -> None:
        made[parameter].step()

    hook: Any = {"closure": step, "global": _step_of_the_module, "method": _Stepper(made).step}[holds]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(hook)
    model(**batch())["loss"].backward()

    def seen() -> list[Any]:
        return [
            (float(o.state[p]["step"]), o.state[p]["exp_avg"].tolist(), p.tolist(), o.param_groups[0]["lr"])
            for p, o in made.items()
        ]

    before = seen()
    check_training(model, batch())
    assert seen() == before
    model(**batch())["loss"].backward()
    assert seen() != before


def test_a_snapshot_tells_what_is_opaque() -> None:
    assert Snapshot(Net(torch.ones(2, 2).to_mkldnn())).opaque == {"odd": "a tensor of layout _mkldnn"}
    assert Snapshot(Net(torch.ones(2, 2))).opaque == {}


def test_hooks_can_be_put_on_again_afterwards() -> None:
    """A tensor that had none gets its registry of hooks taken away."""
    parameter = nn.Parameter(torch.ones(1))
    layer = nn.Module()
    layer.weight = parameter
    with Keeper(layer):
        parameter.register_hook(lambda gradient: gradient * 2)
        parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert parameter._backward_hooks is None
    parameter.sum().backward()
    assert parameter.grad is not None
    assert float(parameter.grad) == 1.0
    called = []
    parameter.register_hook(lambda gradient: called.append("hook"))
    parameter.register_post_accumulate_grad_hook(lambda _: called.append("after"))
    parameter.sum().backward()
    assert called == ["hook", "after"]
