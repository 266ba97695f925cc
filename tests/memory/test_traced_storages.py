"""What is recorded of operations on the meta device, and which kernel of attention stands in for CUDA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from pytest_lora.inspection.memory.cuda_kernels import _Autocast, cuda_kernels
from pytest_lora.inspection.memory.meta_answers import StandIns
from pytest_lora.inspection.memory.storage_tracker import (
    OUTSIDE,
    NeedsValuesError,
    StorageTracker,
    _operation,
)

HALF = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = torch.float32, needs_grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=needs_grad)


def tracker(vocab: int | None = 7, **more: Any) -> StorageTracker:
    return StorageTracker(vocab, StandIns(padded=False, experts=None), **more)


def test_storages_are_recorded_in_order() -> None:
    seen, given = tracker(), meta(3, 4)
    seen.ignore(given)
    with seen.recorded():
        one = given + 1
        view = one.view(4, 3)
        seen.unit, seen.phase = 3, "backward"
        two = torch.mm(given, meta(4, 7))
        del one, view
        with seen.holding("held"):
            three = two * 2
        four = torch.ones(3)
        nothing = meta(0)
        del two
    assert seen.sizes == [48, 4 * 7 * 4, 84, 84]
    assert seen.events == [0, 1, 2, ~1, ~0, 3, ~2]
    assert seen.units == [OUTSIDE, *[3] * 6]
    assert seen.phases == ["forward", *["backward"] * 6]
    assert seen.categories == ["activations", "logits and loss", "logits and loss", "held"]
    assert seen.streams == [0] * 4
    assert seen.flops == [(3, "backward", 2 * 3 * 4 * 7)]
    seen.recategorize(three, "gradients")
    seen.recategorize(given, "gradients")
    assert seen.categories[3] == "gradients"
    seen.recording = False
    del three, given
    assert len(seen.events) == 7
    assert (four.numel(), nothing.numel()) == (3, 0)
    assert tracker(None)._category("aten.mm", meta(3, 7)) == "activations"
    assert tracker()._category("bnb.dequantize_4bit", meta(3, 7)) == "dequantization buffers"


def test_results_of_several_tensors_are_recorded_each() -> None:
    seen = tracker()
    with seen.recorded():
        values, indices = torch.max(meta(3, 4), dim=1)
    assert seen.sizes[-2:] == [12, 24]
    assert (values.shape, indices.shape) == ((3,), (3,))


class Unpacks(StandIns):
    """Stands in for a kernel that unpacks its weight, and the scales of the weight, while it runs."""

    def held_by_the_kernel(self, func: Any, args: tuple[Any, ...]) -> list[tuple[str, torch.Tensor]]:
        return [("unpacked", meta(number)) for number in (5, 6)]


def test_what_a_kernel_holds_is_held_until_its_result_is_there() -> None:
    seen = StorageTracker(None, Unpacks(padded=False, experts=None))
    given = meta(3, 4)
    seen.ignore(given)
    with seen.recorded():
        result = given + 1
    assert seen.sizes == [20, 24, 48]
    assert seen.events[:3] == [0, 1, 2]
    assert sorted(seen.events[3:]) == [~1, ~0]
    assert seen.operations == ["unpacked", "unpacked", "aten.add.Tensor"]
    assert result.shape == (3, 4)


def test_a_storage_that_is_emptied_and_filled_again() -> None:
    seen, tensor = tracker(), meta(4)
    storage = tensor.untyped_storage()
    seen.ignore(tensor)
    storage.resize_(0)
    seen.resized(storage, 16)
    assert seen.events == []
    storage.resize_(32)
    seen.resized(storage, 0)
    seen.resized(storage, 32)  # nothing changed
    assert (seen.events, seen.sizes, seen.categories) == ([0], [32], ["gathered parameters"])
    storage.resize_(0)
    seen.resized(storage, 32)
    assert seen.events == [0, ~0]
    seen.recording = False
    storage.resize_(32)
    seen.resized(storage, 0)
    assert seen.events == [0, ~0]
    elsewhere = torch.ones(4).untyped_storage()
    seen.recording = True
    seen.resized(elsewhere, 0)
    assert seen.events == [0, ~0]


def test_values_of_the_host_lose_theirs_where_they_meet_none() -> None:
    seen = tracker()
    with seen.recorded():
        made = torch.where(meta(3).bool(), meta(3), torch.ones(3))
        assert made.is_meta
        with pytest.raises(NeedsValuesError, match=r"in the forward needs values"):
            meta(1).item()


@pytest.mark.parametrize(
    ("kernel", "query", "heads", "mask", "fused"),
    [
        ("flash", meta(2, 8, 5, 64, dtype=HALF), 8, None, True),
        ("flash", meta(2, 8, 5, 256, dtype=HALF), 4, None, True),
        ("flash", meta(2, 8, 5, 257, dtype=HALF), 4, None, False),
        ("flash", meta(2, 8, 5, 64), 4, None, False),
        ("flash", meta(2, 8, 5, 64), 8, None, True),
        ("flash", meta(2, 8, 5, 64, dtype=HALF), 4, meta(5, 5), False),
        ("flash", meta(2, 8, 5, 64, dtype=HALF), 8, meta(5, 5), True),
        ("flash", meta(2, 8, 5, 64, dtype=HALF), 8, meta(5, 5, dtype=HALF, needs_grad=True), False),
        ("cudnn", meta(2, 8, 5, 64, dtype=torch.float16), 4, None, True),
        ("efficient", meta(2, 8, 5, 64, dtype=HALF), 4, None, False),
        ("efficient", meta(2, 8, 5, 64, dtype=HALF), 8, None, True),
        ("math", meta(2, 8, 5, 64, dtype=HALF), 8, None, False),
        ("flash", meta(2, 5, 64, dtype=HALF), 5, None, False),
        ("flash", torch.ones(2, 8, 5, 64), 8, None, False),
    ],
)
def test_which_kernel_attention_takes(
    kernel: Any, query: torch.Tensor, heads: int, mask: torch.Tensor | None, fused: bool
) -> None:
    other = query.new_empty(*query.shape[:-3], *(heads, *query.shape[-2:])[3 - query.dim() + 1 :])
    if query.dim() == 3:
        other = query.new_empty(query.shape)
    counted: list[int] = []
    with cuda_kernels(None, kernel, counted.append):
        attend = functional.scaled_dot_product_attention
        if mask is not None and not fused and mask.dtype != query.dtype:
            mask = mask.to(query.dtype)
        out = attend(query, other, other, attn_mask=mask, enable_gqa=other.shape[1] != query.shape[1])
    assert out.shape == query.shape
    assert bool(counted) is fused
    if fused:
        assert counted == [4 * 2 * 8 * 5 * 5 * query.shape[-1]]


def sizes_of_backward(kernel: Any, groups: int) -> list[int]:
    seen = tracker(None)
    query = meta(1, 4, 8, 16, dtype=HALF, needs_grad=True)
    key, value = (meta(1, groups, 8, 16, dtype=HALF, needs_grad=True) for _ in range(2))
    for tensor in (query, key, value):
        seen.ignore(tensor)
    with cuda_kernels(None, kernel, seen.count), seen.recorded():
        out = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        start = len(seen.sizes)
        assert seen.sizes == [1 * 4 * 8 * 16 * 2, 1 * 4 * 8 * 4]
        out.backward(torch.empty_like(out))
    return seen.sizes[start + 1 :]  # without the gradient that it begins with


def test_storages_of_the_backward_of_attention() -> None:
    queries, keys, log_sums = 4 * 8 * 16, 2 * 8 * 16, 4 * 8 * 4
    # The sums of rows, and the query's gradient in float32; with groups, gradients of keys and values a query head.
    assert sizes_of_backward("flash", 4)[:5] == [log_sums, 4 * queries, *[2 * queries] * 3]
    wide = [2 * queries] * 2
    grouped = [2 * queries, 2 * keys, 2 * keys]
    assert sizes_of_backward("flash", 2)[:7] == [log_sums, 4 * queries, *wide, *grouped]
    assert sizes_of_backward("cudnn", 2)[:5] == [log_sums, 4 * queries, *grouped]


@pytest.mark.parametrize(
    ("kernel", "heads_first", "copied"),
    [
        ("flash", True, True),
        ("flash", False, False),
        ("cudnn", True, True),
        ("cudnn", False, False),
        ("efficient", True, False),
        ("efficient", False, False),
    ],
)
def test_heads_are_copied_side_by_side_where_the_kernel_left_them_first(
    kernel: Any, heads_first: bool, copied: bool
) -> None:
    shape = (2, 3, 5, 16) if heads_first else (2, 5, 3, 16)
    query, key, value = (meta(*shape, dtype=HALF, needs_grad=True) for _ in range(3))
    seen = tracker(None)
    with cuda_kernels(None, kernel):
        turned = [t if heads_first else t.transpose(1, 2) for t in (query, key, value)]
        out = functional.scaled_dot_product_attention(turned[0], turned[1], turned[2])
        seen.ignore(out)
        with seen.recorded():
            joined = out.transpose(1, 2).reshape(2, 5, 3 * 16)
        assert (2 * joined.numel() in seen.sizes) is copied
        gradients = torch.autograd.grad(out, turned, torch.empty_like(out))
    heads_lie_first = [gradient.is_contiguous() for gradient in gradients]
    assert heads_lie_first == [heads_first and kernel != "efficient"] * 3


def test_dropout_keeps_a_byte_a_number() -> None:
    for p, training, kept in ((0.5, True, [400, 100]), (0.0, True, None), (0.5, False, None)):
        seen, given = tracker(None), meta(100)
        with cuda_kernels(None), seen.recorded():
            functional.dropout(given, p, training)
        if kept is None:
            assert 100 not in seen.sizes
        else:
            assert sorted(seen.sizes, reverse=True) == kept
    with cuda_kernels(None):
        assert functional.dropout(torch.ones(3), 0.0).tolist() == [1.0, 1.0, 1.0]


def test_autocast_where_torch_has_none() -> None:
    weight, wide = meta(4, 4), meta(4, 4, dtype=HALF)
    with cuda_kernels(HALF):
        assert torch.is_autocast_enabled("meta")
        assert torch.get_autocast_dtype("meta") == HALF
        assert not torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert functional.linear(weight, weight).dtype == HALF
        assert torch.matmul(weight, other=weight).dtype == HALF
        assert functional.softmax(wide, dim=-1).dtype == torch.float32
        assert functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
        with torch.autocast("meta", enabled=False):
            assert functional.linear(weight, weight).dtype == torch.float32
            assert not torch.is_autocast_enabled("meta")
        with torch.autocast("cpu", dtype=HALF):
            assert functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == HALF
        assert torch.is_autocast_enabled("meta")
    with cuda_kernels(None):
        assert not torch.is_autocast_enabled("meta")
        with torch.autocast("meta"):
            assert functional.linear(weight, weight).dtype == torch.float32
        with torch.autocast("cpu", dtype=HALF):
            assert torch.is_autocast_enabled("cpu")
    assert _Autocast(HALF).dtype_of("meta") == HALF
    assert _Autocast(None).dtype_of("meta") == torch.get_autocast_dtype("cuda")
    assert _Autocast(HALF).dtype_of("cpu") == torch.get_autocast_dtype("cpu")


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("view", True),
        ("t", True),
        ("split.Tensor", True),
        ("detach", True),
        ("mm", False),
        ("add_.Tensor", False),
    ],
)
def test_operations_that_only_look_at_what_they_are_given(name: str, looks: bool) -> None:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")
    assert _operation(func) == (str(func), looks)


def test_a_look_at_a_storage_from_outside_is_where_it_is_met_first() -> None:
    """What was there before the step and is no weight counts from where the step first sees it."""
    seen, outside = tracker(), meta(3, 4)
    with seen.recorded():
        views = outside.view(4, 3), *outside.unbind()
    assert (seen.sizes, seen.operations, seen.events) == ([48], ["aten.view.default"], [0])
    assert len(views) == 4


def test_a_look_that_fails_without_values_is_said_to_need_them() -> None:
    seen = tracker()
    with (
        seen.recorded(),
        pytest.raises(NeedsValuesError, match=r"aten\.view\.default in the forward needs values"),
    ):
        torch.ops.aten.view.default(meta(3, 4), [5])


def test_a_look_with_a_stand_in_is_answered_by_it() -> None:
    """Images whose sizes are not known get equal shares."""
    seen = tracker()
    with seen.recorded():
        parts = torch.ops.aten.split_with_sizes.default(meta(2, 6), [1, 2, 4], 1)
    assert [tuple(part.shape) for part in parts] == [(2, 2)] * 3
