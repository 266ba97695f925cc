"""Steps at points that were not traced: from two traces where every size is one product, else from a dozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_lora.facts.operations import StepFlops
from pytest_lora.inspection.memory.estimate import StepShape
from pytest_lora.inspection.memory.monomials import (
    Monomials,
    NotMonomialError,
    Total,
    further_points,
    products,
)
from pytest_lora.inspection.memory.operations import FlopsSurface
from pytest_lora.inspection.memory.sizes import Family, Point, Surface, check_point, fitted, grid
from pytest_lora.inspection.memory.step import Step

TOLERANCE = 0.0005
"""Share of the bytes by which an interpolated step may differ from a traced one."""

FIT_AFTER = 6
"""Points that are traced one by one before a surface is fitted to a grid, which takes a dozen traces."""


class Traced(NamedTuple):
    """A step, and what it shares with steps at other points."""

    shape: StepShape
    step: Step

    def values(self) -> list[int]:
        """Everything that differs from point to point."""
        counts = (count for _, _, count in self.step.counted)
        return [*self.step.sizes, self.step.paged, *counts]

    def is_like(self, other: Step) -> bool:
        """Whether another step makes and frees the same storages, of other sizes."""
        mine = self.step
        same = (
            mine.events == other.events
            and mine.loading == other.loading
            and mine.units == other.units
            and mine.categories == other.categories
            and mine.operations == other.operations
            and _renumbered(mine.streams) == _renumbered(other.streams)
        )
        return same and [c[:2] for c in mine.counted] == [c[:2] for c in other.counted]


def _renumbered(streams: list[int]) -> list[int]:
    """Streams by their first use: which number a stream has differs from trace to trace; 0 is the computation's."""
    seen = {0: 0}
    return [seen.setdefault(stream, len(seen)) for stream in streams]


class Answer(NamedTuple):
    """A step at a point; its operations are None where only sizes are known."""

    shape: StepShape
    sizes: NDArray[np.int64]
    paged: int
    flops: StepFlops | None


def answer_of(traced: Traced) -> Answer:
    """The answer that a trace gives."""
    step = traced.step
    return Answer(traced.shape, np.array(step.sizes), step.paged, step.flops)


class _Products:
    """Exact: each size, and each operation's count, is one product; what is not is refused."""

    def __init__(self, known: Mapping[Point, Traced]) -> None:
        here = next(iter(known.values()))
        self._shape = here.shape
        terms = products(list(known), [traced.values() for traced in known.values()])
        sizes = len(here.step.sizes) + 1
        self._sizes = Monomials(terms[:sizes])
        counted = terms[sizes:]
        phases = [(phase, times) for phase, times, _ in here.step.counted]
        self._flops = [
            Total(counted, [times if phase == name else 0 for phase, times in phases])
            for name in StepFlops._fields
        ]

    def __call__(self, point: Point) -> Answer:
        sizes = self._sizes(point)
        flops = StepFlops(*(total(point) for total in self._flops))
        return Answer(self._shape, sizes[:-1], int(sizes[-1]), flops)

    def holds_for(self, point: Point, traced: Traced) -> bool:
        """Whether a step that was traced is the one that is said."""
        said, step = self(point), traced.step
        same = traced.shape is self._shape and said.paged == step.paged and said.flops == step.flops
        return same and bool(np.array_equal(said.sizes, step.sizes))


class _Grid:
    """Sizes within a tolerance, by a polynomial through a dozen steps."""

    def __init__(self, shape: StepShape, sizes: Surface, flops: FlopsSurface | None) -> None:
        self._shape, self._sizes, self._flops = shape, sizes, flops

    def __call__(self, point: Point) -> Answer:
        sizes = self._sizes(point)
        flops = self._flops(point) if self._flops is not None else None
        return Answer(self._shape, sizes[:-1], int(sizes[-1]), flops)


class Surfaces:
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
        self._avoided = avoided
        self._family, self._traced, self._trace, self._step = family, traced, trace, step
        self._known: dict[Any, Callable[[Point], Answer]] = {}
        self._products: list[_Products] = []
        self._refused: set[Any] = set()
        self._asked: Counter[Any] = Counter()

    def __call__(self, point: Point) -> Answer | None:
        """The step at a point that was not traced; None where it has to be."""
        family = self._family(point)
        known = self._known.get(family.key)
        return known(point) if known is not None else None

    def learn(self, point: Point) -> None:
        """Find out about the family of a point that is asked for, if that is worth its traces."""
        family = self._family(point)
        self._asked[family.key] += 1
        if not self._fits(point, family) and family.key not in self._refused:
            self._pair(family)
            self._fits(point, family)
        if family.key not in self._known and self._asked[family.key] > FIT_AFTER:
            self._grid(family)

    def _fits(self, point: Point, family: Family) -> bool:
        """Whether the products of another family hold here too, which a trace of the point itself shows."""
        if family.key in self._known or not self._products:
            return family.key in self._known
        traced = self._trace(point)
        for found in self._products:
            if found.holds_for(point, traced):
                self._known[family.key] = found
                return True
        return False

    def _pair(self, family: Family) -> None:
        """Trace a second point, and a third if need be, and find the products that they have in common."""
        first = self._first(family)
        if first is None:
            return
        own = self._family(first)
        for wanted in dict.fromkeys((own.widest(), own)):
            known = {first: self._traced[first]}
            for further in islice(further_points(first, wanted, self._avoided), 2):
                known[further] = self._trace(further)
                if not known[first].is_like(known[further].step):
                    break
                with suppress(NotMonomialError):
                    found = _Products(known)
                    self._products.append(found)
                    self._known[own.key] = self._known[wanted.key] = found
                    return
        self._refused.add(own.key)

    def _first(self, family: Family) -> Point | None:
        """A point that was traced within the same reach, of the same family if there is one."""
        near = [point for point in self._traced if self._family(point).reach == family.reach]
        return min(near, key=lambda point: self._family(point).key != family.key, default=None)

    def _grid(self, family: Family) -> None:
        steps: dict[Point, Step] = {}

        def sizes_at(point: Point) -> tuple[Any, NDArray[np.int64]]:
            step = steps[point] = self._step(point)
            return (step.events, step.units), np.array([*step.sizes, step.paged])

        self._asked[family.key] = -(10**9)  # once
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
