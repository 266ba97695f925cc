"""What a weighted combination of adapters has to be, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pytest_lora.inspection.behaviour.copies import TOLERANCES
from pytest_lora.inspection.peft_internals import LoraLayer
from pytest_lora.inspection.state.precision import in_float64

Combination = Literal["cat", "svd", "linear"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)
"""Those of PEFT whose result is determined: the others drop or vote on single values."""


def rank_of(model: nn.Module, adapter: str) -> int:
    """The largest rank that an adapter has on a module."""
    ranks: list[int] = [layer.r[adapter] for layer in _layers(model, adapter).values()]
    return max(ranks)


def combination_error(
    model: nn.Module, combined: str, weights: Mapping[str, float], kind: Combination
) -> str | None:
    """How a combination of adapters differs from what it has to be, in words; None within rounding.

    "cat" is the weighted sum of the updates, "svd" the best approximation of that sum at its rank
    (Eckart and Young, 1936). "linear" sums the factors and not the updates, so products of one adapter's B with
    another's A come in; PEFT's documentation calls it a rough approximation.

    Args:
        model: Carries all these adapters.
        combined: Name of the combination.
        weights: Weight of each adapter in it.
        kind: How they were combined.
    """
    for name, layer in _layers(model, combined).items():
        seen = in_float64(layer.get_delta_weight(combined).detach())
        updates = [w * in_float64(layer.get_delta_weight(a).detach()) for a, w in weights.items()]
        expected = torch.stack(updates).sum(0) if kind != "linear" else _of_summed_factors(layer, weights)
        scale = max(float(update.norm()) for update in updates)
        lost = _beyond(expected, layer.r[combined]) if kind == "svd" else 0.0
        allowed = lost + TOLERANCES[torch.float32] * scale
        if not (apart := float((seen - expected).norm())) <= allowed:
            return (
                f"{name}: the update is {apart:.3g} away from that combination, at most {allowed:.3g} is due"
            )
    return None


def _layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer for name, layer in found.items() if adapter in layer.scaling}


def _of_summed_factors(layer: Any, weights: Mapping[str, float]) -> Tensor:
    shares = {name: (weight * layer.scaling[name]) ** 0.5 for name, weight in weights.items()}
    factors = [(share, *_factors(layer, name)) for name, share in shares.items()]
    down = torch.stack([share * in_float64(a.detach()) for share, a, _ in factors]).sum(0)
    up = torch.stack([share * in_float64(b.detach()) for share, _, b in factors]).sum(0)
    return (up @ down).T if layer.lora_embedding_A else up @ down


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _beyond(update: Tensor, rank: int) -> float:
    """Norm of what no matrix of this rank can hold."""
    return float(torch.linalg.svdvals(update.flatten(1))[rank:].norm())
