"""Whether a module runs with a graph, asked from inside its forward pass."""

from __future__ import annotations

import sys
from enum import IntEnum
from types import FrameType

import torch
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
