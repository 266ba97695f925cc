"""The parts of the keeper alone: memory of tensors, fingerprints, containers and attributes, what is reached."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import operator
import signal
import sys
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_lora.inspection.state import Interrupts, Keeper
from pytest_lora.inspection.state import attributes as attributes_module
from pytest_lora.inspection.state.attributes import (
    AttributeBatch,
    Attributes,
    elements,
    is_container,
    refill,
    slots_of,
    values_of,
)
from pytest_lora.inspection.state.memory import OpaqueTensorError, _overlaps, memory_of
from pytest_lora.inspection.state.process import _Handlers
from pytest_lora.inspection.state.reachable import MOST_NAME, Reachable, _is_stateful, _trains
from pytest_lora.inspection.state.tensors import (
    _SMALL_BYTES,
    Content,
    Contents,
    TensorState,
    _fingerprint,
    _words,
    same_contents,
)

# ---------------------------------------------------------------------------------- memory


def parts(tensor: Tensor) -> list[str]:
    return [name for name, _ in memory_of(tensor)]


@pytest.mark.filterwarnings("ignore")
def test_what_holds_the_values_of_a_tensor() -> None:
    plain = torch.ones(2, 3)
    assert parts(plain) == [""]
    assert parts(plain.to("meta")) == []
    assert parts(plain.to_sparse()) == ["._indices", "._values"]
    assert parts(plain.to_sparse_csr()) == [".crow_indices", ".col_indices", ".values"]
    assert parts(plain[:1].expand(4, 3)) == [".storage"]
    assert parts(torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8)) == [".storage"]
    with pytest.raises(OpaqueTensorError, match="a tensor of layout _mkldnn"):
        parts(plain.to_mkldnn())
    with pytest.raises(OpaqueTensorError, match="not initialized yet"):
        parts(nn.LazyLinear(2).weight)


@pytest.mark.parametrize(
    ("size", "stride", "overlaps"),
    [
        ((2, 3), (3, 1), False),
        ((2, 3), (1, 2), False),
        ((2, 3), (0, 1), True),
        ((2, 3), (1, 1), True),
        ((2, 2), (1, 1), True),
        ((2, 3), (2, 1), True),
        ((2, 2), (4, 1), False),
        ((2, 3), (4, 2), True),
        ((2, 3), (6, 2), False),
        ((1, 3), (9, 1), False),
        ((3,), (0,), True),
        ((0, 3), (1, 2), False),
    ],
)
def test_numbers_that_share_memory(size: tuple[int, ...], stride: tuple[int, ...], overlaps: bool) -> None:
    assert _overlaps(torch.zeros(20).as_strided(size, stride)) is overlaps


def test_a_number_that_stands_for_a_million_million_costs_none_of_their_memory() -> None:
    assert _overlaps(torch.zeros(1).expand(10**12))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=4))
def test_numbers_share_memory_where_two_have_one_place(steps: list[tuple[int, int]]) -> None:
    sizes, strides = [size for size, _ in steps], [stride for _, stride in steps]
    places = [
        sum(map(operator.mul, at, strides)) for at in itertools.product(*(range(size) for size in sizes))
    ]
    assert _overlaps(torch.zeros(100).as_strided(sizes, strides)) is (len(set(places)) < len(places))


def test_a_tensor_that_got_other_memory_is_compared_with_what_is_there() -> None:
    tensor = torch.ones(4)
    before = Content.of(tensor, copied=True)
    assert before.equals(tensor)
    tensor.data = torch.zeros(4)
    assert not before.equals(tensor)
    tensor.data = torch.ones(4)
    assert before.equals(tensor)


def test_the_same_contents() -> None:
    one = torch.tensor([1.0, 0.0])
    assert same_contents(one, one.clone())
    assert not same_contents(one, torch.tensor([1.0, -0.0]))
    assert not same_contents(one, one.double())
    assert not same_contents(one, one[None])
    assert not same_contents(one, one.to_sparse())
    assert same_contents(one.to_sparse(), one.to_sparse())


@pytest.mark.parametrize(
    ("numbers", "dtype", "words"),
    [
        (4, torch.float32, torch.int64),
        (3, torch.float32, torch.int32),
        (8, torch.uint8, torch.int64),
        (12, torch.uint8, torch.int32),
        (5, torch.uint8, torch.uint8),
        (0, torch.float32, torch.int64),
    ],
)
def test_memory_as_the_widest_words_that_fit(numbers: int, dtype: torch.dtype, words: torch.dtype) -> None:
    found = _words(torch.zeros(numbers, dtype=dtype))
    assert found is not None
    assert found.dtype == words
    assert found.nbytes == numbers * dtype.itemsize


def test_memory_that_is_not_read_as_words() -> None:
    whole = torch.arange(16.0).reshape(4, 4)
    assert _words(whole.t()) is None
    assert _words(whole[1:]) is None
    assert _words(torch.zeros(2, dtype=torch.complex64).conj()) is None
    assert _words(torch.zeros(2, dtype=torch.complex64).conj().imag) is None


def whole_numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_fingerprints_by_hand() -> None:
    odd = 0x9E3779B97F4A7C15
    # Words times 1, 3, 5, ..., and after each part the sum times a number that is odd.
    assert _fingerprint(whole_numbers(7)) == 7 * odd % 2**64
    assert _fingerprint(whole_numbers(7, 2)) == (7 + 2 * 3) * odd % 2**64
    assert _fingerprint(whole_numbers(7, 2, 1)) == (7 + 2 * 3 + 5) * odd % 2**64
    assert _fingerprint(torch.tensor([3, 2], dtype=torch.uint8)) == 3 + 2 * 3
    nine = torch.cat([whole_numbers(7).view(torch.uint8), torch.tensor([4], dtype=torch.uint8)])
    assert _fingerprint(nine) == (7 * odd + 4) % 2**64
    assert _fingerprint(nine[1:]) == _fingerprint(nine[1:].clone())
    # Parts of 65,536 words.
    long = torch.zeros(2**16 + 1, dtype=torch.int64)
    long[0], long[-1] = 5, 9
    assert _fingerprint(long) == (5 * odd + 9) * odd % 2**64
    short = long[: 2**16].clone()
    short[-1] = 1
    assert _fingerprint(short) == (5 + 2 * (2**16 - 1) + 1) * odd % 2**64


def state(tensor: Tensor, copied: bool = True, owner: nn.Module | None = None) -> TensorState:
    return TensorState.of("a", tensor, owner, Content.of(tensor, copied))


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("numbers", [3, _SMALL_BYTES // 4, _SMALL_BYTES // 4 + 1])
def test_contents_that_change_are_found_and_put_back(copied: bool, numbers: int) -> None:
    tensors = [torch.ones(numbers), torch.ones(3, dtype=torch.uint8), torch.ones(4, 2).t(), torch.ones(9)[1:]]
    states = [state(tensor, copied) for tensor in tensors]
    contents = Contents(states)
    assert contents.differing() == []
    for tensor, kept in zip(tensors, states, strict=True):
        before = tensor.clone()
        tensor.reshape(-1)[-1:] += 1 if tensor.is_contiguous() else 0
        if not tensor.is_contiguous():
            tensor[-1, -1] += 1
        assert contents.differing() == [kept]
        assert kept.restore_contents() is copied
        assert torch.equal(tensor, before) is copied
        tensor.copy_(before)
        assert contents.differing() == []


def test_small_tensors_are_compared_together() -> None:
    assert _SMALL_BYTES == 131_072
    small, large = torch.zeros(2**15), torch.zeros(2**15 + 1)
    contents = Contents([state(small), state(large)])
    assert [id(s.tensor) for s in contents._small] == [id(small)]
    assert [s.tensor.numel() for s in contents._others] == [2**15 + 1]


def test_a_tensor_gets_its_memory_and_its_settings_back() -> None:
    tensor = nn.Parameter(torch.ones(3))
    tensor.grad = torch.ones(3)
    kept, gradient, place = state(tensor), tensor.grad, tensor.data_ptr()
    assert kept.is_intact()
    tensor.data = torch.zeros(4, dtype=torch.float64)
    assert not kept.is_intact()
    tensor.requires_grad_(False)
    tensor.grad = None
    assert kept.restore_contents()
    kept.restore_settings()
    assert tensor.data_ptr() == place
    assert tensor.requires_grad
    assert tensor.grad is gradient
    derived = tensor * 2
    held = state(derived)
    held.restore_settings()
    assert derived.grad_fn is not None
    handle = tensor.register_hook(print)
    hooked = state(tensor)
    handle.remove()
    hooked.restore_settings()
    assert list(tensor._backward_hooks.values()) == [print]
    kept.restore_settings()
    assert not tensor._backward_hooks


def test_what_libraries_change_by_themselves() -> None:
    norm, linear = nn.BatchNorm1d(2), nn.Linear(2, 2)
    quantized = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn"})(2, 2)
    assert norm.running_mean is not None
    assert state(norm.running_mean, owner=norm).is_changed_by_library()
    assert not state(norm.weight, owner=norm).is_changed_by_library()
    for owner, name, dtype, shape, changed in (
        (quantized, "x.bias", torch.bfloat16, (2,), True),
        (quantized, "x.weight", torch.bfloat16, (2,), False),
        (quantized, "x.bias", torch.float32, (2,), False),
        (quantized, "x.bias", torch.bfloat16, (3,), False),
        (linear, "x.bias", torch.bfloat16, (2,), False),
    ):
        tensor = torch.ones(2)
        kept = TensorState.of(name, tensor, owner, Content.of(tensor, True))
        tensor.data = torch.ones(shape, dtype=dtype)
        assert kept.is_changed_by_library() is changed


# ---------------------------------------------------------------------------------- attributes


def test_what_is_a_container() -> None:
    for held in ({}, [], set(), deque(), OrderedDict(), UserDict(), UserList(), nn.Module()._modules):
        assert is_container(held)
    for other in (1, "a", b"a", None, (1,), frozenset(), bytearray(b"a"), nn.ModuleList(), nn.ModuleDict()):
        assert not is_container(other)


class Slotted:
    __slots__ = ("__hidden", "__weakref__", "a", "b")

    def __init__(self) -> None:
        self.a, self.__hidden = 1, 2


class Below(Slotted):
    __slots__ = "c"

    def __init__(self) -> None:
        super().__init__()
        self.c = 3


def test_attributes_outside_of_the_dict() -> None:
    assert set(slots_of(Below())) == {"c", "_Slotted__hidden", "a", "b"}
    assert values_of(Below()) == {"c": 3, "_Slotted__hidden": 2, "a": 1}
    owner = Below()
    kept = Attributes.of("x", owner)
    owner.a, owner.b = 5, 6
    del owner.c
    assert AttributeBatch([kept]).changed() == [kept]
    assert kept.restore() == []
    assert values_of(owner) == {"c": 3, "_Slotted__hidden": 2, "a": 1}

    class Refusing:
        __slots__ = ("only",)

        def __init__(self) -> None:
            object.__setattr__(self, "only", 1)

    one = Attributes.of("x", Refusing())
    one.values["missing"] = 2
    assert one.restore() == []


def test_attributes_and_containers_are_put_back_in_place() -> None:
    first, second = object(), object()
    owner = SimpleNamespace(kept=[first, second], named={"a": first}, number=1, empty=[])
    before = Attributes.of("x", owner)
    same = Attributes.of("x", owner)
    assert before.same_as(same)
    assert [name for name, _ in before.held()] == ["kept.0", "kept.1", "named.a", "number"]
    kept = owner.kept
    owner.kept.reverse()
    assert not before.same_as(Attributes.of("x", owner))
    owner.named = {"a": first}
    owner.more = 3
    del owner.number
    owner.empty.append(first)
    batch = AttributeBatch([before])
    assert batch.changed()
    assert before.restore() == []
    assert vars(owner).keys() == {"kept", "named", "number", "empty"}
    assert owner.kept is kept == [first, second]
    assert owner.named is before.values["named"]
    assert owner.empty == []
    owner.empty.append(first)
    assert AttributeBatch([before]).changed() == [before]


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.kept.append(1),
        lambda o: o.kept.reverse(),
        lambda o: o.named.update(a=3),
        lambda o: o.named.update(b=3),
        lambda o: o.empty.add(3),
        lambda o: setattr(o, "number", 2),
        lambda o: setattr(o, "other", 2),
        lambda o: delattr(o, "number"),
    ],
)
def test_each_change_is_seen_at_once(change: Any) -> None:
    owner = SimpleNamespace(kept=[1, 2], named={"a": 1}, empty=set(), number=1)
    attributes = Attributes.of("x", owner)
    still = Attributes.of("y", SimpleNamespace(kept=[1]))
    batch = AttributeBatch([attributes, still])
    assert batch.changed() == []
    change(owner)
    assert set(map(id, batch.changed())) == {id(attributes)}
    assert attributes.restore() == []
    assert batch.changed() == []
    assert (owner.kept, owner.named, owner.empty, owner.number) == ([1, 2], {"a": 1}, set(), 1)


def test_children_parameters_and_buffers_that_are_others() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("saved", torch.ones(1))
    module.register_buffer("derived", torch.ones(1), persistent=False)
    module.inner = nn.Linear(1, 1)
    kept = Attributes.of("x", module)
    assert list(kept.replaced_entries(module)) == []
    weight = nn.Parameter(torch.ones(2, 2))
    module.weight = weight
    module.saved = torch.ones(1)
    module.derived = torch.ones(1)  # transformers registers frequencies anew
    module.inner = nn.Linear(1, 1)
    module.more = nn.Linear(1, 1)
    found = [(registry, key) for registry, key, _ in kept.replaced_entries(module)]
    assert found == [
        ("_modules", "inner"),
        ("_modules", "more"),
        ("_parameters", "weight"),
        ("_buffers", "saved"),
    ]
    del module.derived
    assert ("_buffers", "derived") in [entry[:2] for entry in kept.replaced_entries(module)]
    assert kept.restore() == []
    assert list(kept.replaced_entries(module)) == []


def test_the_order_of_what_is_registered_is_kept() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    kept = Attributes.of("x", module)
    batch = AttributeBatch([kept])
    first = module._modules.pop("0")
    module._modules["0"] = first
    assert kept.restore() == []
    assert list(module._modules) == ["0", "1"]
    assert batch.changed() == []
    parameters = nn.Linear(1, 1)
    held = AttributeBatch([Attributes.of("y", parameters)])
    assert held.changed() == []
    parameters._parameters["bias"] = nn.Parameter(parameters.bias.detach().clone())
    assert len(held.changed()) == 1


def test_a_child_under_another_name_is_another() -> None:
    module = nn.Sequential(OrderedDict(a=nn.Linear(1, 1)))
    kept = Attributes.of("x", module)
    module._modules["b"] = module._modules.pop("a")
    assert [entry[:2] for entry in kept.replaced_entries(module)] == [("_modules", "a"), ("_modules", "b")]


@pytest.mark.parametrize(
    ("container", "before"),
    [
        ([1, 2], [3]),
        ({"a": 1}, {"b": 2, "a": 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2}, {3}),
        (deque([1]), [2, 3]),
        (OrderedDict(a=1), {"b": 2}),
        (UserDict(a=1), {"b": 2}),
        (UserList([1]), [2]),
    ],
)
def test_containers_are_filled_again(container: Any, before: Any) -> None:
    refill(container, before)
    assert list(container) == list(before)
    if hasattr(before, "values"):
        assert list(container.values()) == list(before.values())


def test_a_container_that_refuses_is_told() -> None:
    class Frozen(UserList[int]):
        def clear(self) -> None:
            raise TypeError

    with pytest.raises(TypeError, match="a Frozen cannot be changed"):
        refill(Frozen([1]), [2])

    class Immutable(list[int]):
        def clear(self) -> None:
            raise TypeError

    held = Immutable([1])
    refill(held, [2])
    assert held == [2]
    owner = SimpleNamespace(name=Frozen([1]))
    kept = Attributes.of("x", owner)
    owner.name.append(3)
    assert kept.restore() == ["x.name"]
    assert [name for name, _ in elements("x", {"a": 1, (1,): 2})] == ["x.a", "x"]
    assert [name for name, _ in elements("x", [5, 6])] == ["x.0", "x.1"]
    assert attributes_module._same_elements([1], None) is False
    assert attributes_module._same_elements({"a": 1}, {"a": 2}) is False


# ---------------------------------------------------------------------------------- reached


def reached(value: Any) -> tuple[list[str], list[str]]:
    found = Reachable()
    found.add("x", value)
    return [one.name for one in found.objects], [name for name, _ in found.tensors.values()]


@dataclasses.dataclass
class Data:
    inner: Any


class Stateful:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def state_dict(self) -> None: ...


class Other:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


def test_what_is_followed() -> None:
    tensor = torch.ones(1)
    assert reached(Data(tensor)) == (["x"], ["x.inner"])
    assert reached(Stateful([tensor])) == (["x"], ["x.inner.0"])
    assert reached(Other(tensor)) == ([], [])
    assert reached([{"a": (tensor,)}]) == ([], ["x.0.a.0"])
    assert reached(nn.Linear(1, 1)) == ([], [])
    assert reached(torch) == ([], [])
    assert reached(Data) == ([], [])
    trained, plain = Stateful(tensor), Other(tensor)

    def closes_over() -> Any:
        return trained, plain

    assert reached(closes_over) == (["x"], ["x.inner"])
    assert reached(functools.partial(print, trained)) == (["x"], ["x.inner"])
    assert reached(functools.partial(print, end=trained)) == (["x"], ["x.inner"])

    def by_default(given: Any = trained) -> Any:
        return given

    assert reached(by_default) == (["x"], ["x.inner"])
    holder = Other(trained)
    holder.method = lambda: None
    assert reached(Other.__init__.__get__(holder))[0] == ["x"]
    found = Reachable()
    found.add("x", [tensor])
    found.add("y", [tensor])
    assert [name for name, _ in found.tensors.values()] == ["x.0"]
    assert len(found.containers().containers) == 2


def test_names_stay_short() -> None:
    assert MOST_NAME == 300
    nested: Any = torch.ones(1)
    for _ in range(400):
        nested = [nested]
    (_, names) = reached(nested)
    assert max(len(name) for name in names) <= 310
    (_, exact) = reached({"a" * 298: torch.ones(1)})
    assert exact == ["x." + "a" * 298]
    (_, longer) = reached({"a" * 299: torch.ones(1)})
    assert longer == ["x." + "a" * 298 + "..."]


def test_what_steps_change() -> None:
    stateful = Stateful(1)
    assert _trains(stateful)
    assert _trains([stateful])
    assert _trains({"a": stateful})
    assert _trains(([stateful],))
    assert not _trains([[[stateful]]])
    assert _trains(test_names_stay_short)
    assert not _trains(Other(1))
    assert not _trains([])
    assert not _trains([None, stateful])
    assert not _trains(nn.Linear(1, 1))
    assert not _trains(Stateful)
    assert _is_stateful(stateful)
    assert _is_stateful(Data(1))
    assert not _is_stateful(Other(1))
    kept = type("Cache", (), {"__module__": "transformers.cache_utils"})()
    assert _is_stateful(kept)
    assert _is_stateful(type("State", (), {"__module__": "bitsandbytes.functional"})())


# ---------------------------------------------------------------------------------- process


def test_handlers_of_a_library_that_is_imported_meanwhile_stay() -> None:
    torch_s, nowhere_s = (logging.getLogger(name) for name in ("torch.of_a_test", "nowhere.of_a_test"))
    before = _Handlers.now()
    handler = logging.NullHandler()
    for logger in (torch_s, nowhere_s):
        logger.addHandler(handler)
        logger.propagate = False
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "nowhere", SimpleNamespace())
        before.restore()
    assert (torch_s.handlers, torch_s.propagate) == ([], True)
    assert (nowhere_s.handlers, nowhere_s.propagate) == ([handler], False)
    before.restore()
    assert (nowhere_s.handlers, nowhere_s.propagate) == ([], True)


def test_each_thing_that_a_logger_has_comes_back() -> None:
    logger = logging.getLogger("nowhere.of_another_test")
    handlers, filters = logger.handlers, logger.filters
    changes: tuple[Callable[[], object], ...] = (
        lambda: logger.handlers.append(logging.NullHandler()),
        lambda: logger.filters.append(logging.Filter()),
        lambda: setattr(logger, "handlers", []),
        lambda: setattr(logger, "filters", []),
        lambda: setattr(logger, "propagate", False),
    )
    for change in changes:
        before = _Handlers.now()
        change()
        before.restore()
        assert logger.handlers is handlers
        assert logger.filters is filters
        assert (handlers, filters, logger.propagate) == ([], [], True)


# ---------------------------------------------------------------------------------- signals


def test_handlers_that_nobody_changed_are_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts = Interrupts()
    interrupts.hold()
    interrupts.release()
    done: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: done.append(number))
    interrupts.release()
    assert done == []


def test_what_is_kept_later_is_known_beside_the_model() -> None:
    model, later = nn.Linear(2, 2), torch.ones(3)
    with Keeper(model) as keeper:
        keeper.keep([later])
        later.zero_()
        before = keeper.before(later)
    assert before is not None
    assert before.tolist() == later.tolist() == [1.0, 1.0, 1.0]
