"""Steps at points that were not traced: from two traces where every size is one product, else from a dozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_lora.facts.operations import StepFlops
from pytest_lora.inspection.memory.dry_run import Trace
from pytest_lora.inspection.memory.estimate import StepShape
from pytest_lora.inspection.memory.learning import Learner
from pytest_lora.inspection.memory.monomials import Monomials, Term, Total
from pytest_lora.inspection.memory.operations import FlopsSurface
from pytest_lora.inspection.memory.sizes import Family, Point, Surface, check_point, fitted, grid
from pytest_lora.inspection.memory.step import Recorded, Step, renumbered

TOLERANCE = 0.0005
"""Share of the bytes by which an interpolated step may differ from a traced one."""

FIT_AFTER = 6
"""Points that are traced one by one before a surface is fitted to a grid, which takes a dozen traces."""


class Recording(NamedTuple):
    """What ran at one point."""

    recorded: Recorded

    def values(self) -> list[int]:
        """Sizes of storages and counts of operations."""
        return [value for trace in self._traces() for value in (*trace.sizes, *(f[2] for f in trace.flops))]

    def is_like(self, other: Recording) -> bool:
        """Whether the same storages are made and freed, and the same operations run."""
        mine, theirs = ([_form(trace) for trace in one._traces()] for one in (self, other))
        return mine == theirs

    def composed(self, terms: Sequence[Term]) -> Callable[[Point], Recorded]:
        """The same with other values."""
        values_at = Monomials(terms)

        def said(point: Point) -> Recorded:
            values = iter(values_at(point).tolist())
            traces = [_with_values(trace, values) for trace in self._traces()]
            micro = traces[: len(self.recorded.micro)]
            return Recorded(tuple(micro), traces[-1] if self.recorded.evaluation else None)

        return said

    def is_said_by(self, said: Any) -> bool:
        """Whether it is what was said of its point."""
        other = Recording(said)
        return self.is_like(other) and self.values() == other.values()

    def _traces(self) -> list[Trace]:
        return [trace for trace in (*self.recorded.micro, self.recorded.evaluation) if trace is not None]


def _form(trace: Trace) -> tuple[Any, ...]:
    """What is the same at each point of a family."""
    flops = [counted[:2] for counted in trace.flops]
    streams = renumbered(trace.streams)
    return trace.events, trace.units, trace.phases, trace.categories, trace.operations, streams, flops


def _with_values(trace: Trace, values: Iterator[int]) -> Trace:
    return replace(
        trace,
        sizes=[next(values) for _ in trace.sizes],
        flops=[(unit, phase, next(values)) for unit, phase, _ in trace.flops],
    )


class Recordings(Learner[Recording]):
    """What runs in the steps of one model, where that is the same whatever a GPU holds beside it.

    Args:
        family: Of a point.
        run: Runs a step.
        avoided: As for ``Learner``.
    """

    def __init__(
        self,
        family: Callable[[Point], Family],
        run: Callable[[Point], Recorded],
        avoided: Container[int] = (),
    ) -> None:
        super().__init__(family, {}, self._record, avoided)
        self._run = run

    def _record(self, point: Point) -> Recording:
        if point not in self._traced:
            self._traced[point] = Recording(self._run(point))
        return self._traced[point]

    def at(self, point: Point) -> Recorded:
        """What runs at a point: said where its family is known, else run."""
        if point not in self._traced:
            said: Recorded | None = self(point)
            if said is not None:
                return said
        return self._record(point).recorded


class Answer(NamedTuple):
    """A step at a point; its operations are None where only sizes are known."""

    shape: StepShape
    sizes: NDArray[np.int64]
    paged: int
    flops: StepFlops | None


class Traced(NamedTuple):
    """A step, and what it shares with steps at other points."""

    shape: StepShape
    step: Step

    def values(self) -> list[int]:
        """Everything that differs from point to point."""
        counts = (count for _, _, count in self.step.counted)
        return [*self.step.sizes, self.step.paged, *counts]

    def is_like(self, other: Traced) -> bool:
        """Whether another step makes and frees the same storages, of other sizes."""
        return self.shares_its_shape_with(other.step)

    def shares_its_shape_with(self, other: Step) -> bool:
        """Whether what was worked out of this step's events is that of another one's."""
        mine = self.step
        same = (
            mine.events == other.events
            and mine.loading == other.loading
            and mine.units == other.units
            and mine.categories == other.categories
            and mine.operations == other.operations
            and renumbered(mine.streams) == renumbered(other.streams)
        )
        return same and [c[:2] for c in mine.counted] == [c[:2] for c in other.counted]

    def composed(self, terms: Sequence[Term]) -> Callable[[Point], Answer]:
        """Answers for other points, given how each value grows."""
        sizes = len(self.step.sizes) + 1
        sizes_at = Monomials(terms[:sizes])
        phases = [(phase, times) for phase, times, _ in self.step.counted]
        totals = [
            Total(terms[sizes:], [times if phase == name else 0 for phase, times in phases])
            for name in StepFlops._fields
        ]

        def said(point: Point) -> Answer:
            values = sizes_at(point)
            flops = StepFlops(*(total(point) for total in totals))
            return Answer(self.shape, values[:-1], int(values[-1]), flops)

        return said

    def is_said_by(self, said: Answer) -> bool:
        """Whether it is what was said of its point."""
        same = self.shape is said.shape and said.paged == self.step.paged and said.flops == self.step.flops
        return same and bool(np.array_equal(said.sizes, self.step.sizes))


def answer_of(traced: Traced) -> Answer:
    """The answer that a trace gives."""
    step = traced.step
    return Answer(traced.shape, np.array(step.sizes), step.paged, step.flops)


class _Grid:
    """Sizes within a tolerance, by a polynomial through a dozen steps."""

    def __init__(self, shape: StepShape, sizes: Surface, flops: FlopsSurface | None) -> None:
        self._shape, self._sizes, self._flops = shape, sizes, flops

    def __call__(self, point: Point) -> Answer:
        sizes = self._sizes(point)
        flops = self._flops(point) if self._flops is not None else None
        return Answer(self._shape, sizes[:-1], int(sizes[-1]), flops)


class Surfaces(Learner[Traced]):
    """What is known of the steps of one model, by families of points.

    Args:
        family: Of a point.
        traced: What was traced so far.
        trace: Traces a step, and keeps it in ``traced``.
        step: Traces a step that is not kept.
        avoided: Lengths that are not traced: the model knows them as something else.
    """

    def __init__(
        self,
        family: Callable[[Point], Family],
        traced: dict[Point, Traced],
        trace: Callable[[Point], Traced],
        step: Callable[[Point], Step],
        avoided: Container[int] = (),
    ) -> None:
        super().__init__(family, traced, trace, avoided)
        self._step = step
        self._asked: Counter[Any] = Counter()

    def learn(self, point: Point) -> None:
        """Find out about the family of a point that is asked for, if that is worth its traces."""
        super().learn(point)
        family = self._family(point)
        self._asked[family.key] += 1
        if family.key not in self._known and self._asked[family.key] == FIT_AFTER + 1:
            self._grid(family)

    def _grid(self, family: Family) -> None:
        steps: dict[Point, Step] = {}

        def sizes_at(point: Point) -> tuple[Any, NDArray[np.int64]]:
            step = steps[point] = self._step(point)
            return (step.events, step.units), np.array([*step.sizes, step.paged])

        if family.alone or family.lengths[-1] >= family.between[1]:
            return
        found = fitted(family, sizes_at, TOLERANCE)
        if found is None:
            return
        points = grid(family)
        counted = FlopsSurface(points, [steps[point].flops for point in points])
        exact = counted(check_point(family)) == steps[check_point(family)].flops
        shape = StepShape(next(iter(steps.values())))
        self._known[family.key] = _Grid(shape, found[1], counted if exact else None)
