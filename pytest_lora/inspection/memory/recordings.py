"""What runs in a step, at points where it was not run: its storages are known, and how their sizes grow."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pytest_lora.inspection.memory.dry_run import Trace
from pytest_lora.inspection.memory.learning import Learner
from pytest_lora.inspection.memory.monomials import Monomials, Term
from pytest_lora.inspection.memory.sizes import Family, Point
from pytest_lora.inspection.memory.step import Recorded, renumbered


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
