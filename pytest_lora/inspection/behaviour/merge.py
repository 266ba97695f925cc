"""An adapter merged into the base and taken out again, on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.findings import Finding, Report, grouped
from pytest_lora.inspection.behaviour.copies import (
    TOLERANCES,
    adapted_copy,
    base_without_adapter,
    distance,
    identical,
    largest,
    no_trace,
    output_of,
    require_batch,
    watched_output,
    without_adapter,
)
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import WRAPPERS, LoraLayer

_OUTPUT_DIFFERS = "LORA915", "merged_output_differs"
_REQUANTIZED = "LORA916", "merging_requantizes_the_base"
_NOT_UNMERGED = "LORA917", "unmerge_does_not_restore_the_base"
_NOT_UNLOADED = "LORA918", "unload_does_not_give_the_base_back"
_NOT_MERGEABLE = "LORA919", "adapter_cannot_be_merged"
_UNMERGE_STEPS = 4
_LOST_TO_QUANTIZATION = 0.5


def check_merge(
    model: nn.Module, batch: Any, *, rtol: float | None = None, atol: float | None = None
) -> Report:
    """Merge, unmerge and unload the adapters, and compare; see ``assert_merge_exact``."""
    require_batch(batch)
    _require_tolerance("rtol", rtol)
    _require_tolerance("atol", atol)
    with no_trace():
        adapted = adapted_copy(model)
        layers = {n: m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
        expected, moving = watched_output(adapted, batch)
        before = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if name not in moving}
        findings = list(_unload_findings(adapted))
        findings += _merge_findings(adapted, layers, batch, expected, (rtol, atol), before)
    return Report(f"merge of {type(model).__name__}", tuple(findings))


def _merge_findings(
    adapted: nn.Module,
    layers: dict[str, Any],
    batch: Any,
    expected: Tensor,
    tolerance: tuple[float | None, float | None],
    before: dict[str, Tensor],
) -> Iterator[Finding]:
    without = without_adapter(layers, lambda: output_of(adapted, batch))
    try:
        for layer in layers.values():
            layer.merge()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        yield Finding(
            *_NOT_MERGEABLE,
            "error",
            grouped(n for n, layer in layers.items() if not layer.merged_adapters),
            f"PEFT refuses to merge: {error}",
            "an adapter that can be merged",
            "keep the adapter apart, or train one without the variant that the message names",
        )
        return
    merged = output_of(adapted, batch)
    sizes = {n: largest(t) for n, t in adapted.state_dict().items() if n in before and t.is_floating_point()}
    quantized = [n for n, layer in layers.items() if _is_quantized(layer)]
    if quantized:
        yield from _requantized(quantized, expected, merged, without)
    else:
        yield from _merged_differs(layers, expected, merged, tolerance)
    for layer in layers.values():
        layer.unmerge()
    if not quantized:
        yield from _unmerge_findings(adapted, before, sizes)


def _is_quantized(layer: Any) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight is not None and not weight.is_floating_point()


def _requantized(
    quantized: list[str], expected: Tensor, merged: Tensor, without: Tensor
) -> Iterator[Finding]:
    loss, effect = distance(expected, merged), distance(expected, without)
    # A fresh adapter has no effect yet that could be lost.
    share = loss / effect if effect else 0.0
    own = f"moves it by {effect:.3g} ({share:.0%})" if effect else "does not move it yet"
    yield Finding(
        *_REQUANTIZED,
        "warning" if share > _LOST_TO_QUANTIZATION else "info",
        grouped(quantized),
        f"merging rounds the weights to the quantized grid again: the output moves by up to {loss:.3g}, where the "
        f"adapter itself {own}",
        "a merge that loses little of what the adapter does",
        "dequantize the base or load it in bfloat16, merge there, and quantize the result if need be",
    )


def _merged_differs(
    layers: dict[str, Any], expected: Tensor, merged: Tensor, tolerance: tuple[float | None, float | None]
) -> Iterator[Finding]:
    dtypes = {p.dtype for layer in layers.values() for p in layer.get_base_layer().parameters()}
    rtol, atol = tolerance
    if rtol is None:
        rtol = max(TOLERANCES.get(dtype, 0.0) for dtype in (*dtypes, expected.dtype))
    allowed = (atol or 0.0) + rtol * largest(expected)
    apart = distance(expected, merged)
    if not apart <= allowed:
        yield Finding(
            *_OUTPUT_DIFFERS,
            "error",
            "the output of the merged model",
            f"it differs by up to {apart:.3g} from that of the model with its adapter",
            f"at most {allowed:.3g}, {rtol:g} of the largest output",
            "look at targets that share a weight (tied embeddings), at weights too coarse for the update, and at "
            "adapters that are active on some modules only",
        )


def _unmerge_findings(
    adapted: nn.Module, before: dict[str, Tensor], merged_sizes: dict[str, float]
) -> Iterator[Finding]:
    after = adapted.state_dict()
    damaged = [n for n, size in merged_sizes.items() if not _restored(before[n], after[n], size)]
    if damaged:
        yield Finding(
            *_NOT_UNMERGED,
            "error",
            grouped(damaged),
            f"{len(damaged)} tensors are not what they were after merge and unmerge",
            f"the same weights, to {_UNMERGE_STEPS} steps of rounding",
            "keep a copy of the base for training on, or merge into a copy",
        )


def _restored(before: Tensor, after: Tensor, merged_size: float) -> bool:
    """Whether adding and taking away again changed no more than rounding at the largest merged value does."""
    if identical(before, after):
        return True
    step = torch.finfo(before.dtype).eps * max(merged_size, largest(before))
    return distance(before, after) <= _UNMERGE_STEPS * step


def _unload_findings(adapted: nn.Module) -> Iterator[Finding]:
    """PEFT's ``unload`` against the base as it lies under the adapter; transformers has no ``unload``."""
    if not isinstance(adapted, WRAPPERS):
        return
    given: Any = copy.deepcopy(adapted)
    kept = _kept_modules(given)
    unloaded = given.unload().state_dict()
    base = base_without_adapter(adapted).state_dict()
    wrong = [
        name
        for name, tensor in base.items()
        if not name.startswith(kept)
        and not (
            name in unloaded and unloaded[name].shape == tensor.shape and torch.equal(unloaded[name], tensor)
        )
    ]
    if wrong:
        yield Finding(
            *_NOT_UNLOADED,
            "error",
            grouped(wrong),
            f"{len(wrong)} tensors differ from those of the base after unload()",
            "the base as it was before the adapter",
            "load the base anew instead of unloading the adapter",
        )


def _kept_modules(adapted: nn.Module) -> tuple[str, ...]:
    """Modules whose trained copy PEFT leaves in place when it unloads, by design."""
    return tuple(f"{name}." for name in adapted_survey(adapted).saved) + tuple(
        f"{name}." for name in adapted_survey(adapted).tokens
    )


def _require_tolerance(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, not {value!r}")
