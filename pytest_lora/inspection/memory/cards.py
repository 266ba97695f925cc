"""Which GPU every event of a step is about, where layers lie on several."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pytest_lora.inspection.memory.layer_stacks import KEPT
from pytest_lora.inspection.memory.parallel.placed import Placement
from pytest_lora.inspection.memory.timeline import Timeline

Integers = NDArray[np.int64]


def gpu_of_events(
    line: Timeline, units: Integers, backward: NDArray[np.bool_], starts: Integers, placement: Placement
) -> Integers:
    """The GPU that holds the storage of each event of the whole step, shape (events,).

    A storage lies where it was made: on the GPU of the layer that ran, or of what comes before or after all layers.

    Args:
        line: The whole step.
        units: The unit of each event of the trace.
        backward: Whether an event of the whole step is in the backward.
        starts: Where the phases of the whole step begin.
        placement: The GPUs of the layers.
    """
    of_unit = units[line.index]
    running = np.full(len(line.index), -1, dtype=np.int64)
    for stack, gpus in enumerate(placement.layers):
        inside = (of_unit >= 0) & (of_unit // KEPT == stack)
        running[inside] = np.array(gpus)[line.layers[inside]]
    for low, high in zip(starts, [*starts[1:], len(running)], strict=True):
        ends = (placement.last, placement.first) if backward[low] else (placement.first, placement.last)
        running[low:high] = _filled(running[low:high], *ends)
    makes = line.weights[line.index] > 0
    of_instance = np.zeros(int(line.instances.max()) + 1, dtype=np.int64)
    of_instance[line.instances[makes]] = running[makes]
    found: Integers = of_instance[line.instances]
    return found


def _filled(gpus: Integers, before: int, after: int) -> Integers:
    """What runs between two layers runs where the first of them does."""
    known = np.flatnonzero(gpus >= 0)
    if not len(known):
        return np.full_like(gpus, before)
    last = np.maximum.accumulate(np.where(gpus >= 0, np.arange(len(gpus)), -1))
    found: Integers = np.where(last >= 0, gpus[last], before)
    found[known[-1] + 1 :] = after
    return found
