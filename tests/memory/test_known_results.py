"""Results that are remembered by shape are those that torch gives, and views are never among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from pytest_lora.inspection.memory.meta_answers import KnownResults

aten: Any = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.mul.Tensor, (meta(4, 6), meta(6, dtype=torch.bfloat16))),
    (aten.mul.Tensor, (meta(4, 6, dtype=torch.long), 2)),
    (aten.mul.Tensor, (meta(4, 6, dtype=torch.long), 2.0)),
    (aten.silu_backward.default, (meta(3, 5, 4).transpose(1, 2), meta(3, 4, 5))),
    (aten.cat.default, ([meta(2, 3), meta(2, 4)], 1)),
    (aten.mm.default, (meta(3, 4).t(), meta(3, 5))),
    (aten.native_dropout.default, (meta(3, 4, dtype=torch.bfloat16), 0.1, True)),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_the_second_time_is_like_the_first(number: int) -> None:
    func, args = CALLS[number]
    results = KnownResults()
    for other, others in CALLS:
        results.run(other, others, {})
    assert results._known
    before = len(results._known)
    found, truth = results.run(func, args, {}), func(*args)
    assert type(found) is type(truth)
    assert len(results._known) == before
    for one, real in zip(tree_leaves(found), tree_leaves(truth), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (real.shape, real.stride(), real.dtype)
        assert one.untyped_storage().nbytes() == real.untyped_storage().nbytes()
    assert len({id(one.untyped_storage()) for one in tree_leaves(found)}) == len(tree_leaves(truth))


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (meta(4, 6), [24])),
        (aten._unsafe_view.default, (meta(4, 6), [24])),
        (aten.t.default, (meta(4, 6),)),
        (aten.mul_.Tensor, (meta(4, 6), 2.0)),
        (aten.split.Tensor, (meta(4, 6), 2)),
        (aten.ones_like.default, (torch.ones(2),)),
    ],
    ids=str,
)
def test_what_shares_a_storage_is_run_again(func: Any, args: tuple[Any, ...]) -> None:
    results = KnownResults()
    results.run(func, args, {})
    assert not results._known


def test_no_more_are_kept_than_said() -> None:
    results = KnownResults(most=3)
    for width in range(1, 8):
        results.run(aten.mul.Tensor, (meta(4, width), 2.0), {})
        assert 0 < len(results._known) <= 3


def test_the_default_dtype_matters() -> None:
    results, numbers = KnownResults(), (meta(4, dtype=torch.long), 2.0)
    assert results.run(aten.mul.Tensor, numbers, {}).dtype == torch.float32
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert results.run(aten.mul.Tensor, numbers, {}).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
