"""Floating-point operations of what a trace runs: torch's own formulas, and those of kernels that it has none for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from pytest_lora.facts.operations import StepFlops
from pytest_lora.inspection.memory.layer_stacks import FIRST_INNER, KEPT, LAST_INNER
from pytest_lora.inspection.memory.timeline import NotRepeatingError

Counts = Sequence[tuple[int, str, int]]
"""Unit of a cut stack, phase, and operations of what computes."""

_MM: Any = torch.ops.aten.mm.default
_torch_forward: Any = sdpa_flop_count
_torch_backward: Any = sdpa_backward_flop_count


def _packed_product(
    left: Sequence[int], right: Sequence[int], shape: Sequence[int], *rest: Any, **named: Any
) -> int:
    """bitsandbytes' ``gemm_4bit``: the packed weight has no shape of its own, it is given the logical one."""
    return 2 * prod(left) * shape[0]


def _int8_product(left: Sequence[int], right: Sequence[int], *rest: Any, **named: Any) -> int:
    return 2 * prod(left) * right[0]


def _mixed_int8_product(
    left: Sequence[int], packed: Sequence[int], right: Sequence[int], *rest: Any, **named: Any
) -> int:
    """``LLM.int8()``: which columns are outliers depends on values; together both parts are the whole product."""
    return 2 * prod(left) * right[0]


def _grouped_product(left: Sequence[int], right: Sequence[int], *rest: Any, **named: Any) -> int:
    """Experts of a mixture in one call: each row, or each part of the inner side, belongs to one of them."""
    experts = left[0] if len(left) == len(right) == 3 else 1
    return 2 * experts * left[-2] * left[-1] * right[-1]


_OF_BITSANDBYTES = {
    "gemm_4bit": _packed_product,
    "int8_linear_matmul": _int8_product,
    "int8_scaled_mm": _int8_product,
    "int8_mixed_scaled_mm": _mixed_int8_product,
}


@cache
def _formulas() -> dict[Any, Any]:
    """torch's registry, with the products that it lacks and that are defined here and now."""
    lacking = [
        *((torch.ops.bitsandbytes, name, formula) for name, formula in _OF_BITSANDBYTES.items()),
        (torch.ops.aten, "_grouped_mm", _grouped_product),
    ]
    own = {
        packet: formula
        for home, name, formula in lacking
        if (packet := getattr(home, name, None)) is not None and packet not in flop_registry
    }
    formulas: dict[Any, Any] = FlopCounterMode(display=False, custom_mapping=own).flop_registry
    return formulas


_KNOWN: dict[int, tuple[Any, Any]] = {}
"""Operations by their id, which they keep as they are kept here, and their formulas: torch hashes them in Python."""


def _formula_of(func: Any) -> Any:
    known = _KNOWN.get(id(func))
    if known is None:
        known = _KNOWN[id(func)] = func, _formulas().get(func.overloadpacket)
    return known[1]


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Operations of one call; 0 where torch counts none."""
    if func is _MM:  # nine of ten, and torch's way through its registry takes longer than the call itself
        return product_flops(*args[:2])
    formula = _formula_of(func)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def product_flops(left: torch.Tensor, right: torch.Tensor) -> int:
    """Operations of a product of an (m, k) with a (k, n) matrix."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Operations of a fused kernel of attention, by torch's formula: all scores, also those that a mask hides.

    Shapes (batch, heads, length, width); each query head multiplies with its group's keys and values.
    """
    return int(_torch_forward(query.shape, *_for_each_query(query, key, value)))


def attention_backward_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Operations of its backward, which computes the scores again."""
    keys, values = _for_each_query(query, key, value)
    return int(_torch_backward((*query.shape[:-1], values[-1]), query.shape, keys, values))


def _for_each_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heads = query.shape[1]
    return (key.shape[0], heads, *key.shape[2:]), (value.shape[0], heads, *value.shape[2:])


def times_played(unit: int, copies: Mapping[int, int]) -> int:
    """How many units of the whole model one that was run stands for.

    Args:
        unit: ``KEPT * stack + i`` for unit ``i`` of a stack, negative outside.
        copies: Inner units of the whole model by stack, of which two were run.
    """
    stack, role = divmod(unit, KEPT)
    return copies[stack] - 1 if stack in copies and role == FIRST_INNER else 1


def require_like_inner_units(counts: Counts, copies: Mapping[int, int]) -> None:
    """Refuse a micro-batch whose two inner units do not compute the same amount.

    Raises:
        NotRepeatingError: They do not.
    """
    totals: Counter[tuple[int, str]] = Counter()
    for unit, phase, count in counts:
        totals[unit, phase] += count
    for stack in copies:
        for phase in ("forward", "backward"):
            inner = (totals[KEPT * stack + role, phase] for role in (FIRST_INNER, LAST_INNER))
            if len(set(inner)) > 1:
                raise NotRepeatingError(f"inner layers of stack {stack} compute different amounts")


class FlopsSurface:
    """Operations at any point: linear in batch size and rank, quadratic in sequence length; exact.

    Args:
        points: A full grid of (batch, length, rank).
        values: What was counted there.
    """

    def __init__(self, points: Sequence[tuple[int, int, int]], values: Sequence[StepFlops]) -> None:
        self._known = dict(zip(points, values, strict=True))
        self._axes = [sorted({point[axis] for point in points}) for axis in range(3)]

    def __call__(self, point: tuple[int, int, int]) -> StepFlops | None:
        """Operations there; None where the polynomial gives no whole number, so that it is none."""
        weights = [_lagrange(axis, at) for axis, at in zip(self._axes, point, strict=True)]
        sums = [Fraction(0), Fraction(0)]
        for (batch, length, rank), flops in self._known.items():
            weight = weights[0][batch] * weights[1][length] * weights[2][rank]
            for index, value in enumerate(flops):
                sums[index] += weight * value
        if any(total.denominator != 1 for total in sums):
            return None
        return StepFlops(*(int(total) for total in sums))


def _lagrange(known: Sequence[int], at: int) -> dict[int, Fraction]:
    """The weight of what is known at each place for what is asked at another."""
    return {
        one: prod((Fraction(at - other, one - other) for other in known if other != one), start=Fraction(1))
        for one in known
    }
