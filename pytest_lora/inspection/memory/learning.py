"""What is known of the steps of one model from a few of them: families in which every value is one product."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Generic, Protocol, Self, TypeVar

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import WHOLE
from pytest_lora.inspection.memory.monomials import NotMonomialError, Term, further_points, products
from pytest_lora.inspection.memory.optimizers import OPTIMIZERS
from pytest_lora.inspection.memory.sizes import Family, Point

_SEVERAL = 2
"""Sequences in a batch of more than one; how many does not tell families apart."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window")


def shares_of(setting: StepSetting) -> int:
    """What a rank must be a multiple of, for sizes to be products of it; 0 where no two ranks are alike.

    FSDP2 divides the first dimension of every parameter, the rank of half the adapter, and rounds up. Optimizers in 8
    bits keep the state of small parameters in 32, and page that of large ones; ZeRO-3 keeps small ones whole.
    """
    shared = setting.parallel
    small = shared is not None and shared.strategy == "zero3"
    if small or OPTIMIZERS[setting.optimizer].paged or "8bit" in setting.optimizer:
        return 0
    if shared is None or shared.strategy not in ("fsdp2", "hsdp"):
        return 1
    return shared.shard_size or shared.gpus


def runs_alike(setting: StepSetting) -> bool:
    """Whether a shared step runs the same at each rank, though no two ranks hold alike: see ``shares_of``.

    FSDP gathers what it divides while the step runs; DDP and ZeRO by formula hold it beside the step.
    """
    shared = setting.parallel
    return shared is not None and shared.strategy in (*WHOLE, "zero3") and not shares_of(setting)


def numbers_of(base: Any) -> set[int]:
    """Whole numbers of a configuration: widths, and the size of the vocabulary."""
    config = getattr(base, "config", base)
    parts = (config, getattr(config, "text_config", None))
    return {n for part in parts if part is not None for n in vars(part).values() if isinstance(n, int)}


def thresholds_of(base: Any) -> list[int]:
    """Sequence lengths from which a model attends in another way."""
    config = getattr(base, "config", base)
    found: set[int] = set()
    for part in (config, getattr(config, "text_config", None)):
        values = (getattr(part, name, None) for name in _WINDOWS)
        found |= {value for value in values if isinstance(value, int) and value > 1}
    return sorted(found)


class Sample(Protocol):
    """What was found out at one point."""

    def values(self) -> Sequence[int]:
        """Everything that differs from point to point of a family."""

    def is_like(self, other: Self) -> bool:
        """Whether another one differs in values alone."""

    def composed(self, terms: Sequence[Term]) -> Callable[[Point], Any]:
        """What is said of other points, given how each value grows."""

    def is_said_by(self, said: Any) -> bool:
        """Whether it is what was said of its point."""


Found = TypeVar("Found", bound=Sample)


class Products:
    """Exact: each value is one product; what is not is refused.

    Args:
        known: Samples that are alike; see ``monomials.products``.

    Raises:
        NotMonomialError: One of the values is none.
    """

    def __init__(self, known: Mapping[Point, Sample]) -> None:
        here = next(iter(known.values()))
        self._said = here.composed(products(list(known), [sample.values() for sample in known.values()]))

    def __call__(self, point: Point) -> Any:
        return self._said(point)


class Learner(Generic[Found]):
    """Finds products by families of points.

    Args:
        family: Of a point.
        traced: What was found out so far.
        trace: Finds out about a point, and keeps it in ``traced``.
        avoided: Lengths that are not tried: the model knows them as something else.
    """

    def __init__(
        self,
        family: Callable[[Point], Family],
        traced: dict[Point, Found],
        trace: Callable[[Point], Found],
        avoided: Container[int] = (),
    ) -> None:
        self._family, self._traced, self._trace, self._avoided = family, traced, trace, avoided
        self._known: dict[Any, Callable[[Point], Any]] = {}
        self._products: list[Products] = []
        self._refused: set[Any] = set()

    def __call__(self, point: Point) -> Any:
        """What is said of a point; None where it has to be traced."""
        known = self._known.get(self._family(point).key)
        return known(point) if known is not None else None

    def learn(self, point: Point) -> None:
        """Find out about the family of a point that is asked for.

        Where a trace of the point shows that no products hold that are known, it is the answer; those of its own
        family are looked for once another point of it is asked for.
        """
        family = self._family(point)
        if family.key in self._known:
            return
        new = self._products and not self._was_traced(family)
        if not new and family.key not in self._refused:
            self._pair(family)
        if family.key not in self._known and self._products:
            self._fit(point, family)

    def learn_ahead(self, point: Point) -> None:
        """Find out about the families of one sequence and of several, once a point of either was traced."""
        for batch in (point[0], _SEVERAL if point[0] == 1 else 1):
            family = self._family((batch, *point[1:]))
            if family.key in self._known or family.key in self._refused:
                continue
            if not self._was_traced(family):
                for near in islice(further_points(point, family, self._avoided, self._ranks(family)), 1):
                    self._trace(near)
            self._pair(family)

    def _was_traced(self, family: Family) -> bool:
        return any(self._family(point).key == family.key for point in self._traced)

    def _ranks(self, family: Family) -> list[int]:
        """Ranks that were traced within the reach of a family, the last ones first."""
        near = (point[2] for point in reversed(self._traced) if self._family(point).reach == family.reach)
        return list(dict.fromkeys(near))

    def _fit(self, point: Point, family: Family) -> None:
        """Take the products of another family where they hold here too, which a trace of the point itself shows."""
        traced = self._trace(point)
        for found in self._products:
            if traced.is_said_by(found(point)):
                self._known[family.key] = found
                return

    def _pair(self, family: Family) -> None:
        """Trace a second point, and a third if need be, and find the products that they have in common."""
        first = self._first(family)
        if first is None:
            return
        own, ranks = self._family(first), self._ranks(family)
        for wanted in dict.fromkeys((own.widest(), own)):
            known = {first: self._traced[first]}
            for further in islice(further_points(first, wanted, self._avoided, ranks), 2):
                known[further] = self._trace(further)
                if not known[first].is_like(known[further]):
                    break
                with suppress(NotMonomialError):
                    found = Products(known)
                    self._products.append(found)
                    self._known[own.key] = self._known[wanted.key] = found
                    return
        self._refused.add(own.key)

    def _first(self, family: Family) -> Point | None:
        """A point that was traced within the same reach, of the same family if there is one."""
        near = [point for point in self._traced if self._family(point).reach == family.reach]
        return min(near, key=lambda point: self._family(point).key != family.key, default=None)
