"""What surrounds the steps of a training: dropouts that act, weights that were repacked, inputs that are not finite.

How modules are run is asked from inside their forward pass: whether with a graph, and with adapters that act.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from pytest_lora.inspection.peft_internals import LoraLayer, active_adapters
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


class Ran(IntEnum):
    """How a module was run, the least that a gradient can follow first."""

    CUT = 0
    WITHOUT_GRAPH = 1
    WITH_GRAPH = 2


class Passed:
    """Notes which adapted modules take part in forward passes, and how.

    Attributes:
        ran: How each of them was run at best, by its name; those that were not are missing.
        switched_off: Whether one was run with its adapters switched off.
        without_gradient: Adapters that took part in a pass with gradients off.
        thinned: Whether a pass with gradients and adapters off ran in training mode, where dropout acts.
    """

    def __init__(self) -> None:
        self.ran: dict[str, Ran] = {}
        self.switched_off = False
        self.without_gradient: set[str] = set()
        self.thinned = False
        self._looks = True

    def follow(self, layers: Mapping[str, Any]) -> None:
        """Begin to note; the hooks go where the keeper puts back all hooks."""
        for name, layer in layers.items():
            layer.register_forward_pre_hook(self._toucher(name))

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Passes inside are no part of the training."""
        self._looks = False
        try:
            yield
        finally:
            self._looks = True

    def without(self, layers: Iterable[str]) -> tuple[str, ...]:
        """Those of some modules that were not run."""
        return tuple(name for name in layers if name not in self.ran)

    def at_most(self, how: Ran) -> tuple[str, ...]:
        """Modules that were run so at best."""
        return tuple(name for name, ran in self.ran.items() if ran <= how)

    def references(self, active: Iterable[str]) -> tuple[str, ...]:
        """Adapters, other than the active ones, that took part in a pass with gradients off."""
        return tuple(sorted(self.without_gradient.difference(active)))

    def _toucher(self, name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: Any, arguments: Any) -> None:
            if not self._looks:
                return
            self.switched_off |= bool(module.disable_adapters)
            first = arguments[0] if arguments else None
            if not isinstance(first, Tensor) or first.numel():
                how = how_it_runs()
                self.ran[name] = max(self.ran.get(name, Ran.CUT), how)
                if how is Ran.WITHOUT_GRAPH and not module.disable_adapters:
                    self.without_gradient.update(active_adapters(module))
                self.thinned |= how is Ran.WITHOUT_GRAPH and module.disable_adapters and module.training

        return note


def how_it_runs() -> Ran:
    """How the module whose hook calls this is run.

    Reentrant checkpointing (``torch.utils.checkpoint``) runs a segment with gradients off, and once more with them on
    only where an input of the segment requires gradients.
    """
    if torch.is_grad_enabled():
        return Ran.WITH_GRAPH
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CHECKPOINTED:
            return Ran.CUT
        frame = frame.f_back
    return Ran.WITHOUT_GRAPH


_CHECKPOINTED = checkpoint.CheckpointFunction.forward.__code__
