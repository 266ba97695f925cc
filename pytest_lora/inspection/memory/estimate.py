"""From events of a step to the figures that users ask for, on each GPU where layers lie on several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pytest_lora.facts.memory_choices import CATEGORIES, TimelinePoint
from pytest_lora.inspection.memory.cuda_allocator import Replay, max_reserved, rounded
from pytest_lora.inspection.memory.dry_run import EVALUATION
from pytest_lora.inspection.memory.layer_stacks import KEPT
from pytest_lora.inspection.memory.parallel.placed import Placement
from pytest_lora.inspection.memory.step import PHASES, Step
from pytest_lora.inspection.memory.timeline import Timeline, expand

Integers = NDArray[np.int64]
_CATEGORY = {category: number for number, category in enumerate(CATEGORIES)}
_PHASE = {phase: number for number, phase in enumerate(PHASES)}


class FastPeak:
    """The peak from the events that decide it: of a stretch that repeats, its first and its last time.

    A stretch of equal changes rises or falls by the same amount each time, so that no time between is higher.
    """

    def __init__(self, line: Timeline, storages: Integers) -> None:
        stretches = [(b, time) for b in line.blocks for time in range(min(b.repeat, 2))]
        index = np.concatenate([np.arange(b.low, b.high) for b, _ in stretches])
        lengths = [b.high - b.low for b, _ in stretches]
        self._storages = storages[index]
        self._weights = line.weights[index]
        self._starts = np.cumsum([0, *lengths[:-1]])
        self._skipped = np.array([max(b.repeat - 2, 0) if time == 0 else 0 for b, time in stretches])

    def __call__(self, sizes: Integers) -> int:
        """The most bytes allocated at once; ``sizes`` are rounded, shape (storages,)."""
        change = sizes[self._storages] * self._weights
        skipped = np.add.reduceat(change, self._starts) * self._skipped
        change[self._starts[1:]] += skipped[:-1]
        return int(np.cumsum(change).max())


class StepShape:
    """What stays the same in a step when rank, batch or sequence change: everything but the sizes.

    Raises:
        NotRepeatingError: The layers that were traced cannot stand for those that were not.
    """

    def __init__(self, step: Step) -> None:
        like: list[object] = list(zip(step.sizes, step.categories, step.operations, strict=True))
        self.step = step
        self.line = expand(step.events, step.units, step.copies, like, step.breaks)
        events = np.array(step.events, dtype=np.int64)
        self._storages = np.where(events < 0, ~events, events)
        self._frees = events < 0
        self._streams = np.array(step.streams, dtype=np.int64)
        self._categories = np.array(list(map(_CATEGORY.__getitem__, step.categories)))
        self._phases = np.array(list(map(_PHASE.__getitem__, step.phases)))
        self._second_step = int(np.flatnonzero(self.line.index >= step.first)[0])
        self._loaded = int(np.flatnonzero(self.line.index >= step.loaded)[0])
        self._cut = expand(step.loading, step.loading_units, step.copies, like) if step.loading else None
        self._cut_storages = np.array([e if e >= 0 else ~e for e in step.loading], dtype=np.int64)
        self._cut_frees = np.array(step.loading, dtype=np.int64) < 0
        self._starts_empty = step.cut_before_anything
        self._fast = FastPeak(self.line, self._storages)
        self._gpus = None if step.placement is None else self._gpu_of_events(step)

    def peak_allocated(self, sizes: Integers) -> int:
        """The most bytes allocated at once; ``sizes`` by storage, shape (storages,)."""
        if self._gpus is not None:
            return max(self._peaks(sizes, self._gpus))
        return self._fast(rounded(sizes))

    def over_gpus(self, sizes: Integers, gpus: int) -> int:
        """The peaks of all GPUs together."""
        return (
            sum(self._peaks(sizes, self._gpus))
            if self._gpus is not None
            else gpus * self.peak_allocated(sizes)
        )

    def _gpu_of_events(self, step: Step) -> Integers:
        phases = self._phases[self.line.index]
        starts = np.flatnonzero(np.diff(phases, prepend=-1))
        backward = phases == PHASES.index("backward")
        assert step.placement is not None
        return gpu_of_events(self.line, np.array(step.units), backward, starts, step.placement)

    def _changes(self, sizes: Integers) -> Integers:
        index = self.line.index
        change: Integers = np.where(self._frees[index], -1, 1) * rounded(sizes)[self._storages[index]]
        return change

    def _peaks(self, sizes: Integers, of_events: Integers) -> list[int]:
        """The most bytes allocated at once on each of several GPUs."""
        change = self._changes(sizes)
        gpus = range(int(of_events.max()) + 1)
        return [int(np.cumsum(np.where(of_events == gpu, change, 0)).max()) for gpu in gpus]

    def _counted(self, sizes: Integers) -> NDArray[np.bool_]:
        """The events of the GPU that the figures are of."""
        if self._gpus is None:
            return np.ones(len(self.line.index), dtype=np.bool_)
        counted: NDArray[np.bool_] = self._gpus == int(np.argmax(self._peaks(sizes, self._gpus)))
        return counted

    def peak_reserved(self, sizes: Integers, replay: Replay, *, emptied: bool, late: bool = False) -> int:
        """The most bytes that the allocator takes from the device; its cache may be emptied between steps.

        What other streams than that of the computation free may come late within a step; see ``max_reserved``.
        """
        counted = self._counted(sizes)
        index = self.line.index[counted]
        storages, instances, frees = self._storages[index], self.line.instances[counted], self._frees[index]
        second = int(np.count_nonzero(counted[: self._second_step]))
        while_cut = 0
        if self._cut is not None and self._starts_empty:
            while_cut = max_reserved(sizes, *self._cutting(), replay=replay)
        elif self._cut is not None:
            storages, instances, frees = self._after_cutting(storages, instances, frees)
            second += len(storages) - len(index)
        step = max_reserved(
            sizes,
            storages,
            instances,
            frees,
            second if emptied else None,
            replay,
            self._streams,
            caught_up=second if late else None,
        )
        apart = int(sizes[self.step.apart]) if self.step.apart >= 0 else 0
        return max(step + apart, while_cut)

    def _cutting(self) -> tuple[Integers, Integers, NDArray[np.bool_]]:
        """The storage, the copy of it and whether it is freed, of each event until a model is cut."""
        assert self._cut is not None
        index = self._cut.index
        return self._cut_storages[index], self._cut.instances, self._cut_frees[index]

    def while_loading(self, sizes: Integers) -> int:
        """The most bytes allocated until a model is cut; 0 where that is not followed."""
        if self._cut is None:
            return 0
        storages, _, frees = self._cutting()
        return int(np.cumsum(np.where(frees, -1, 1) * rounded(sizes)[storages]).max())

    def _after_cutting(
        self, storages: Integers, instances: Integers, frees: NDArray[np.bool_]
    ) -> tuple[Integers, Integers, NDArray[np.bool_]]:
        """A step's events with those in the place of its weights by which they came to be; see ``Step.load``."""
        cut_storages, cut_instances, cut_frees = self._cutting()
        first = self._loaded
        own = int(instances.max(initial=0)) + 1
        return (
            np.concatenate([cut_storages, storages[first:]]),
            np.concatenate([cut_instances + own, instances[first:]]),
            np.concatenate([cut_frees, frees[first:]]),
        )

    def figures(self, sizes: Integers) -> Figures:
        """Peak, what it is made of and when it comes."""
        counted = self._counted(sizes)
        index = self.line.index
        storages = self._storages[index]
        change = np.where(counted, self._changes(sizes), 0)
        level = np.cumsum(change)
        peak = int(level.argmax())
        trained = int(np.count_nonzero(index < self.step.trained))
        evaluating = self._phases[index] == PHASES.index(EVALUATION)
        held = np.bincount(
            self._categories[storages[: peak + 1]], change[: peak + 1], minlength=len(CATEGORIES)
        )
        return Figures(
            peak_allocated=int(level[peak]),
            loaded=int(level[self._loaded - 1]),
            loading=self.while_loading(sizes),
            after_step=int(level[trained - 1]),
            training_peak=int(level[~evaluating].max()),
            evaluation_peak=int(level[evaluating].max(initial=0)),
            breakdown={c: int(b) for c, b in zip(CATEGORIES, held, strict=True) if b},
            peak_phase=PHASES[self._phases[index[peak]]],
            peak_operation=self.step.operations[storages[peak]],
            timeline=tuple(self._points(level)),
        )

    def _points(self, level: Integers) -> Iterator[TimelinePoint]:
        """The second step: the first has no optimizer state yet."""
        index, layers = self.line.index, self.line.layers
        phases = self._phases[index]
        second = self._second_step
        phases, layers, level = phases[second:], layers[second:], level[second:]
        starts = np.flatnonzero(np.diff(phases, prepend=-1) | np.diff(layers, prepend=-2))
        peaks = np.maximum.reduceat(level, starts)
        for start, peak in zip(starts, peaks, strict=True):
            layer = int(layers[start])
            yield TimelinePoint(PHASES[phases[start]], layer if layer >= 0 else None, int(peak))


@dataclass(frozen=True)
class Figures:
    """Figures of one step; see ``MemoryEstimate``."""

    peak_allocated: int
    loaded: int
    loading: int
    after_step: int
    training_peak: int
    evaluation_peak: int
    breakdown: dict[str, int]
    peak_phase: str
    peak_operation: str
    timeline: tuple[TimelinePoint, ...]


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
