"""Two training steps as one sequence of events: loading, micro-batches, optimizer, and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.operations import NO_FLOPS, StepFlops
from pytest_lora.inspection.memory.dry_run import EVALUATION, Trace, evaluated, trace
from pytest_lora.inspection.memory.layer_stacks import FIRST_INNER, KEPT
from pytest_lora.inspection.memory.meta_model import MetaModel
from pytest_lora.inspection.memory.operations import require_like_inner_units, times_played
from pytest_lora.inspection.memory.optimizers import OPTIMIZERS, PAGED_FROM, state_bytes
from pytest_lora.inspection.memory.parallel.model import CUT, Loading, Trained, Weight
from pytest_lora.inspection.memory.parallel.placed import Placement
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE

LOAD, OPTIMIZER = "load", "optimizer"
PHASES = (LOAD, "forward", "backward", OPTIMIZER, EVALUATION)
THREADS = ("forward", "backward")
"""Phases whose products of matrices have a cuBLAS handle of their own, and with it a workspace that stays: the backward
runs in a thread of autograd, and torch keeps a handle for each thread and a workspace for each handle and stream
(aten/src/ATen/cuda/CublasHandlePool.cpp)."""


@dataclass
class Step:
    """Events of two steps, and what each storage is.

    Attributes:
        events, units: As in a trace.
        sizes: Bytes by storage.
        categories, operations, streams: By storage.
        phases: Phase of each event.
        loaded, first, trained: Number of events after loading, after the first step, and after the second.
        loading, loading_units: Events and units of what is made and freed until a model is cut; without, nothing is.
        apart: The storage, of no event, that is as large as what is reserved beside what is allocated; -1 for none.
        cut_before_anything: Whether the cache is emptied once the model is cut.
        paged: Bytes of optimizer state outside of the allocator.
        copies: Inner units of the whole model by stack.
        placement: Where layers lie on several GPUs, on which.
        workspaces: Bytes of those that cuBLAS has not allocated yet, by phase.
        breaks: Events at which gradients begin to be freed: what the optimizer did to the last layer is over.
        flops: Floating-point operations of one of the two steps, of the whole model.
        counted: What they are the sum of: phase, how often, and operations at once, in order.
    """

    events: list[int] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    loaded: int = 0
    first: int = 0
    trained: int = 0
    loading: list[int] = field(default_factory=list)
    loading_units: list[int] = field(default_factory=list)
    apart: int = -1
    cut_before_anything: bool = False
    paged: int = 0
    copies: dict[int, int] = field(default_factory=dict)
    placement: Placement | None = None
    workspaces: dict[str, int] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    flops: StepFlops = NO_FLOPS
    counted: list[tuple[str, int, int]] = field(default_factory=list)

    def whole_length(self) -> int:
        """Events of the whole model, where those of an inner unit count for every copy."""
        times = {KEPT * stack + FIRST_INNER: copies - 1 for stack, copies in self.copies.items()}
        return sum(times.get(unit, 1) for unit in self.units)

    def make(self, size: int, category: str, operation: str, phase: str, unit: int) -> int:
        index = self._storage(size, category, operation)
        self._event(index, phase, unit)
        return index

    def _storage(self, size: int, category: str, operation: str) -> int:
        self.sizes.append(size)
        self.categories.append(category)
        self.operations.append(operation)
        self.streams.append(0)
        return len(self.sizes) - 1

    def load(self, loading: Loading, whole: list[Weight]) -> None:
        """Note how a model is cut: beside the step's events, as nothing of it is held when the step begins.

        Args:
            loading: What is made and freed.
            whole: What is on the device before, and stays.
        """
        for weight in whole:
            self.loading.append(self._storage(weight.size, weight.category, LOAD))
            self.loading_units.append(weight.unit)
        self.cut_before_anything = loading.emptied
        offset = len(self.sizes)
        for size in loading.sizes:
            self._storage(size, "parameter shards", LOAD)
        self.loading += [e + offset if e >= 0 else e - offset for e in loading.events]
        self.loading_units += loading.units

    def free(self, index: int, phase: str, unit: int) -> None:
        self._event(~index, phase, unit)

    def _event(self, event: int, phase: str, unit: int) -> None:
        self.events.append(event)
        self.phases.append(phase)
        self.units.append(unit)

    def play(self, traced: Trace) -> dict[int, int]:
        """Add a traced micro-batch; returns the gradients it leaves, by the storage's number in the trace."""
        offset = len(self.sizes)
        self.sizes += traced.sizes
        self.categories += traced.categories
        self.operations += traced.operations
        self.streams += traced.streams
        left: dict[int, int] = {}
        for event, unit, phase in zip(traced.events, traced.units, traced.phases, strict=True):
            if phase in self.workspaces:
                self.make(self.workspaces.pop(phase), "workspace", f"cuBLAS in the {phase}", phase, OUTSIDE)
            self._event(event + offset if event >= 0 else event - offset, phase, unit)
            if event >= 0 and traced.categories[event] == "gradients":
                left[event] = event + offset
            elif event < 0:
                left.pop(~event, None)
        return left


class Recorded(NamedTuple):
    """What runs in a step: its micro-batches, the first and one of the others, and an evaluation."""

    micro: tuple[Trace, ...]
    evaluation: Trace | None


def record(built: MetaModel, setting: StepSetting) -> Recorded:
    """Run the micro-batches of a step, and an evaluation, once each."""
    micro = [trace(built, setting)]
    if setting.accumulation > 1:
        micro.append(trace(built, setting, gradients_held=True))
    evaluation = setting.evaluation
    return Recorded(tuple(micro), evaluated(built, setting, evaluation) if evaluation is not None else None)


def assemble(built: MetaModel, setting: StepSetting, recorded: Recorded | None = None) -> Step:
    """Load the model, then run two optimizer steps: the first has no optimizer state yet.

    Args:
        built: The model.
        setting: The step.
        recorded: What runs in it; None to find out.
    """
    micro, evaluation = recorded or record(built, setting)
    step = Step(copies={stack.number: stack.copies for stack in built.stacks})
    step.placement = None if built.rank is None else built.rank.placement
    for weight in built.held():
        step.make(weight.size, weight.category, "load", LOAD, weight.unit)
    step.workspaces = dict.fromkeys(THREADS, setting.workspace)
    step.loaded = len(step.events)
    if built.rank is not None and built.rank.apart:
        step.apart = step._storage(built.rank.apart, "gathered parameters", LOAD)
    if built.rank is not None and built.rank.loading is not None:
        later = (*CUT, *built.rank.loading.later)
        step.load(built.rank.loading, [w for w in built.held() if w.category not in later])
    step.flops, step.counted = _flops(micro, step.copies, setting.accumulation)
    trained = built.trained()
    for first in (True, False):
        gradients = list(step.play(micro[0]).values())
        homes = _homes(step)
        for repeated in micro[1:]:
            step.play(repeated)
        _optimize(step, built, trained, setting, first=first)
        step.breaks.append(len(step.events))
        for index in gradients:
            step.free(index, OPTIMIZER, homes[index])
        if first:
            step.first = len(step.events)
    step.trained = len(step.events)
    if evaluation is not None:
        step.play(evaluation)
    return step


def _flops(
    micro: Sequence[Trace], copies: dict[int, int], accumulation: int
) -> tuple[StepFlops, list[tuple[str, int, int]]]:
    """Of the first micro-batch, and of the others, which are all like the second."""
    counted: list[tuple[str, int, int]] = []
    for traced, times in zip(micro, (1, accumulation - 1), strict=False):
        require_like_inner_units(traced.flops, copies)
        counted += [(phase, times * times_played(unit, copies), count) for unit, phase, count in traced.flops]
    totals = {"forward": 0, "backward": 0}
    for phase, times, count in counted:
        totals[phase] += times * count
    return StepFlops(**totals), counted


def _homes(step: Step) -> dict[int, int]:
    """The unit in which each storage was made, by its event."""
    return dict(zip(step.events, step.units, strict=True))


def _optimize(
    step: Step,
    built: MetaModel,
    trained: list[Trained],
    setting: StepSetting,
    *,
    first: bool,
) -> None:
    kind = OPTIMIZERS[setting.optimizer]
    temporaries: list[tuple[int, int]] = []
    for parameter in trained:
        unit = parameter.unit
        paged = kind.paged and parameter.numel >= PAGED_FROM
        states = state_bytes(setting.optimizer, parameter.shape, parameter.dtype) if first else ()
        if paged:
            step.paged += sum(states) * built.copies_of(unit)
        else:
            for size in states:
                step.make(size, "optimizer", setting.optimizer, OPTIMIZER, unit)
    if kind.temporaries:
        for parameter in trained:
            size = kind.temporaries * parameter.numel
            made = step.make(size, "optimizer", f"{setting.optimizer} step", OPTIMIZER, parameter.unit)
            temporaries.append((made, parameter.unit))
    for made, unit in temporaries:
        step.free(made, OPTIMIZER, unit)


def renumbered(streams: Sequence[int]) -> list[int]:
    """Streams by their first use: which number a stream has differs from trace to trace; 0 is the computation's."""
    seen = {0: 0}
    return [seen.setdefault(stream, len(seen)) for stream in streams]
