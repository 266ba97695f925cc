"""How modules are run, asked from inside their forward pass: whether with a graph, and with adapters that act."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint


class Ran(IntEnum):
    """How a module was run, the least that a gradient can follow first."""

    CUT = 0
    WITHOUT_GRAPH = 1
    WITH_GRAPH = 2


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


class Calls:
    """How each of some LoRA layers was run, the most that was seen, and whether one was with adapters switched off.

    Attributes:
        ran: By the layer's name; one that was not called, or with nothing in its batch, is not there.
        switched_off: Whether a layer ran while its adapters were disabled.
    """

    def __init__(self) -> None:
        self.ran: dict[str, Ran] = {}
        self.switched_off = False

    def watch(self, layers: Mapping[str, Any]) -> None:
        """Begin to look; the hooks go where the keeper puts back all hooks."""
        for name, layer in layers.items():
            layer.register_forward_pre_hook(self._noting(name))

    def _noting(self, name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: Any, arguments: Any) -> None:
            self.switched_off |= bool(module.disable_adapters)
            first = arguments[0] if arguments else None
            if not isinstance(first, Tensor) or first.numel():
                self.ran[name] = max(self.ran.get(name, Ran.CUT), how_it_runs())

        return note
