"""How modules are run, asked from inside their forward pass: whether with a graph, and with adapters that act."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from pytest_lora.inspection.peft_internals import active_adapters


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
    """

    def __init__(self) -> None:
        self.ran: dict[str, Ran] = {}
        self.switched_off = False
        self.without_gradient: set[str] = set()
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
