"""Adapters merged, on copies of the model: into the base and out again, and with each other by weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pytest_lora.facts.behaviour import MergeFacts
from pytest_lora.inspection.base import dtype_name, quantization_of
from pytest_lora.inspection.behaviour import (
    TOLERANCES,
    adapted_copy,
    base_without_adapter,
    collect,
    distance,
    identical,
    largest,
    lora_layers,
    output_of,
    watched_output,
    without_adapter,
)
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import WRAPPERS
from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.state.precision import in_float64, without_tf32
from pytest_lora.inspection.state.tensors import same_contents

_UNMERGE_STEPS = 4

Combination = Literal["cat", "svd", "linear"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)
"""Those of PEFT whose result is determined: the others drop or vote on single values."""


def merge_facts(
    model: nn.Module, batch: Any, *, rtol: float | None = None, atol: float | None = None
) -> MergeFacts:
    """Merge, unmerge and unload the adapters of a copy, and compare.

    Args:
        model: Anything with PEFT LoRA layers.
        batch: What the model is called with.
        rtol: Relative tolerance of the merged output; by default that of its coarsest dtype.
        atol: Absolute tolerance beside it.

    Raises:
        TypeError: ``model`` carries no LoRA layers.
        ValueError: It cannot be copied or run, or gives no output that can be compared.
    """
    adapted_survey(model)
    with Keeper(model, batch), quiet_libraries(), without_tf32():
        adapted = adapted_copy(model)
        layers = lora_layers(adapted)
        expected, moving = watched_output(adapted, batch)
        unloaded = MergeFacts(restored_steps=_UNMERGE_STEPS)
        before = {name: t for name, t in _in_main_memory(adapted).items() if name not in moving}
        return _merged(unloaded, adapted, layers, batch, expected, (rtol, atol), before)


def _in_main_memory(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state; a GPU that holds two models often has no room for a third."""
    return {
        name: tensor.to("cpu", copy=True)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)  # a layer quantized for inference keeps a dtype there, too
    }


def _merged(
    facts: MergeFacts,
    adapted: nn.Module,
    layers: dict[str, Any],
    batch: Any,
    expected: Tensor,
    tolerance: tuple[float | None, float | None],
    before: dict[str, Tensor],
) -> MergeFacts:
    without = without_adapter(layers, lambda: output_of(adapted, batch))
    try:
        facts = replace(facts, left_over=tuple(_left_over(adapted)))
        for layer in layers.values():
            layer.merge()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        unmerged = tuple(n for n, layer in layers.items() if not layer.merged_adapters)
        return replace(facts, refusal=str(error), unmerged=unmerged)
    merged = output_of(adapted, batch)
    sizes = {n: largest(t) for n, t in adapted.state_dict().items() if n in before and t.is_floating_point()}
    unchanged, dtypes = _rounded_away(layers, before)
    biases = tuple(name for name, layer in layers.items() if _loses_its_bias(name, layer, before))
    for layer in layers.values():
        layer.unmerge()
    quantized = tuple(n for n, layer in layers.items() if _is_quantized(layer))
    after = adapted.state_dict()
    compared = {} if quantized else sizes
    damaged = tuple(n for n, size in compared.items() if not _restored(before[n], after[n], size))
    return replace(
        facts,
        quantized=quantized,
        apart=distance(expected, merged),
        effect=distance(expected, without),
        tolerance=_allowed(layers, expected, tolerance),
        damaged=damaged,
        unchanged=unchanged,
        dtypes=dtypes,
        biases=biases,
    )


def _loses_its_bias(name: str, layer: Any, before: dict[str, Tensor]) -> bool:
    """Whether the bias of a merged layer is not what its adapters make of it; the error of rounding is far smaller."""
    old, bias = before.get(f"{name}.base_layer.bias"), getattr(layer.get_base_layer(), "bias", None)
    own = [
        (layer.scaling[a], getattr(layer.lora_B[a], "bias", None))
        for a in layer.merged_adapters
        if a in layer.lora_B
    ]
    added = sum(scaling * b.detach().float().cpu() for scaling, b in own if b is not None)
    if old is None or bias is None or not isinstance(added, Tensor) or getattr(layer, "lora_variant", None):
        return False
    moved = bias.detach().float().cpu() - old.float()
    return bool((moved - added).norm() > 0.05 * added.norm())


def _rounded_away(layers: dict[str, Any], before: dict[str, Tensor]) -> tuple[float | None, tuple[str, ...]]:
    """Share of the numbers that merging left as they were though they have an update, and the dtypes they are of.

    Of plain LoRA on matrices; variants such as DoRA write the whole weight anew.
    """
    kept = updated = 0
    dtypes: set[str] = set()
    for name, layer in layers.items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        old = before.get(f"{name}.base_layer.weight")
        if old is None or weight is None or weight.ndim != 2 or weight.shape != old.shape:
            continue
        if not weight.is_floating_point() or getattr(layer, "lora_variant", None):
            continue
        if any(getattr(layer, "use_dora", {}).values()):
            continue
        update = sum(layer.get_delta_weight(adapter).float() for adapter in layer.merged_adapters)
        if not isinstance(update, Tensor) or update.shape != weight.shape:
            continue
        moved = update.cpu() != 0
        kept += int((moved & (weight.detach().cpu() == old)).sum())
        updated += int(moved.sum())
        dtypes.add(dtype_name(weight.dtype))
    return (kept / updated if updated else None), tuple(sorted(dtypes))


def _allowed(
    layers: dict[str, Any], expected: Tensor, tolerance: tuple[float | None, float | None]
) -> tuple[float, float]:
    """The relative tolerance, and what it allows for this output."""
    rtol, atol = tolerance
    if rtol is None:
        dtypes = {p.dtype for layer in layers.values() for p in layer.get_base_layer().parameters()}
        rtol = max(TOLERANCES.get(dtype, 0.0) for dtype in (*dtypes, expected.dtype))
    return rtol, (atol or 0.0) + rtol * largest(expected)


def _is_quantized(layer: Any) -> bool:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    return quantization_of(base) is not None or (weight is not None and not weight.is_floating_point())


def _restored(before: Tensor, after: Tensor, merged_size: float) -> bool:
    """Whether adding and taking away again changed no more than rounding at the largest merged value does."""
    before = before.to(after.device)
    if identical(before, after):
        return True
    step = torch.finfo(before.dtype).eps * max(merged_size, largest(before))
    return distance(before, after) <= _UNMERGE_STEPS * step


def _left_over(adapted: nn.Module) -> Iterator[str]:
    """Tensors that PEFT's ``unload`` does not leave as they lie under the adapter; transformers has no ``unload``."""
    if not isinstance(adapted, WRAPPERS):
        return
    given: Any = copy.deepcopy(adapted)
    kept = _kept_modules(given)
    unloaded = _in_main_memory(given.unload())
    del given
    collect(adapted)
    for name, tensor in base_without_adapter(adapted).state_dict().items():
        other = unloaded.get(name)
        same = other is not None and same_contents(other, tensor)
        if not name.startswith(kept) and not same:
            yield name


def _kept_modules(adapted: nn.Module) -> tuple[str, ...]:
    """Modules whose trained copy PEFT leaves in place when it unloads, by design."""
    return tuple(f"{name}." for name in adapted_survey(adapted).saved) + tuple(
        f"{name}." for name in adapted_survey(adapted).tokens
    )


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
    return {name: layer for name, layer in lora_layers(model).items() if adapter in layer.scaling}


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
