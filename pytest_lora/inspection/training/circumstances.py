"""What surrounds the steps of a training: dropouts that act, weights that were repacked, inputs that are not finite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pytest_lora.inspection.peft_internals import LoraLayer
from pytest_lora.inspection.survey import Survey


def spoiled_inputs(batches: tuple[Any, ...]) -> Iterator[str]:
    """Inputs that are not finite. An additive mask is infinite on purpose."""
    for index, batch in enumerate(batches):
        for name, value in batch.items() if isinstance(batch, Mapping) else ():
            known = isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "meta"
            if known and not re.search(r"mask|bias|label", str(name)) and not bool(value.isfinite().all()):
                yield f"batch {index}: {name}"


def blank_inputs(batches: tuple[Any, ...]) -> Iterator[str]:
    """Weights, rewards and masks of answers that are zero in every one of some batches."""
    first = batches[0] if batches and isinstance(batches[0], Mapping) else {}
    for name in first:
        values = [batch.get(name) for batch in batches if isinstance(batch, Mapping)]
        known = all(isinstance(v, Tensor) and v.device.type != "meta" and v.numel() for v in values)
        if _WEIGHS.search(str(name)) and known and not any(bool(v.any()) for v in values if v is not None):
            yield str(name)


_WEIGHS = re.compile(r"advantage|reward|weight|^(?!.*attention).*mask")
"""Names of what a loss is multiplied by."""


def odd_masks(batches: tuple[Any, ...]) -> Iterator[str]:
    """Masks that are shorter than the tokens that they are for; longer ones count keys of a cache too."""
    for index, batch in enumerate(batches):
        ids, mask = (
            map(batch.get, ("input_ids", "attention_mask")) if isinstance(batch, Mapping) else (None, None)
        )
        if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.ndim == mask.ndim == 2):
            continue
        if mask.shape[1] < ids.shape[1]:
            yield f"batch {index}: attention_mask of shape {list(mask.shape)}, input_ids of {list(ids.shape)}"


def row_count(batches: tuple[Any, ...]) -> int:
    """Rows of the first batch, by its first tensor."""
    first = batches[0] if batches and isinstance(batches[0], Mapping) else {}
    return next((v.shape[0] for v in first.values() if isinstance(v, Tensor) and v.ndim), 0)


def live_dropouts(found: Survey) -> Iterator[str]:
    for name, module in found.modules.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            yield name
    for name, layer in found.lora.items():
        if _drops(layer):
            yield f"{name}.lora_dropout"


def _drops(layer: LoraLayer) -> bool:
    active = layer.active_adapters
    dropouts: Any = (layer.lora_dropout[a] for a in active if a in layer.lora_dropout)
    return any(d.training and hasattr(d, "p") and d.p > 0 for d in dropouts)


def repacked_layers(found: Survey) -> Iterator[str]:
    """4-bit layers whose weight is in the packing for inference on a CPU."""
    for name, module in found.modules.items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            yield name
