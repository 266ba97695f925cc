"""What the evidence of a sweep does not settle: noise between seeds, limits within it, edges of the grid, failures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from pytest_lora.facts.sweep import is_enough, percent
from pytest_lora.sweep.goal import more_is_better
from pytest_lora.sweep.rate_evidence import about_rates, edge_of
from pytest_lora.sweep.rows import RankOutcome
from pytest_lora.sweep.verdicts import Doubling, common_differences

_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom; the last also stands for more."""


@dataclass(frozen=True)
class Evidence:
    """A choice and what was measured.

    Attributes:
        outcomes: One a rank.
        ranks: Those of them that have a metric, the smallest first.
        rank: The chosen one.
        shares: Share of the best by rank; empty where the metric rule is not judged.
        doublings: The steps that decided where doubling stops paying.
        before: The metric before training; None where it is not known.
        maximise: Whether more is better.
        metric_share: The threshold of the metric rule.
        min_gain: The threshold of the doubling rule.
        metric: Name of the metric.
    """

    outcomes: tuple[RankOutcome, ...]
    ranks: tuple[RankOutcome, ...]
    rank: int
    shares: dict[int, float]
    doublings: tuple[Doubling, ...]
    before: float | None
    maximise: bool
    metric_share: float
    min_gain: float
    metric: str

    @property
    def chosen(self) -> RankOutcome:
        """The chosen rank."""
        return next(o for o in self.ranks if o.rank == self.rank)

    def caveats(self) -> Iterator[str]:
        """Yield, in a few words each, what is to stand beside the choice."""
        if more_is_better(self.metric) is (not self.maximise):
            yield f"if {'more' if self.maximise else 'less'} {self.metric} is better"
        if edge := edge_of(self.chosen):
            yield edge
        if len(self.chosen.metrics) < 2:
            if len(self.ranks) > 1:
                yield "one seed"
        elif alike := [other for other in self._neighbours() if indistinct(self.chosen, other)]:
            names = " and ".join(f"r={other.rank}" for other in sorted(alike, key=lambda o: o.rank))
            yield f"not told apart from {names} over {len(self.chosen.metrics)} seeds"

    def unsettled(self) -> Iterator[str]:
        """Yield what the measured ranks leave open about the chosen one."""
        yield from self._goal()
        if len(self.chosen.metrics) < 2:
            yield "one seed a rank shows no noise: differences between ranks may be chance (seeds=3 or more tells)"
        yield from filter(None, (indistinct(self.chosen, other) for other in self._neighbours()))
        yield from self._limits()
        if not self.shares and self.before is not None:
            yield f"no rank is better than the metric before training: {self._not_learned()}"
        yield from about_rates(self.ranks, self.rank)
        yield from self._ends()
        for outcome in self.outcomes:
            if outcome.failures:
                kinds = ", ".join(sorted({failure.kind for failure in outcome.failures}))
                missing = len(outcome.failures)
                yield f"r={outcome.rank} lacks {missing} of {missing + len(outcome.metrics)} trials ({kinds})"

    def _neighbours(self) -> Iterator[RankOutcome]:
        position = self.ranks.index(self.chosen)
        yield from self.ranks[max(0, position - 1) : position]
        yield from self.ranks[position + 1 : position + 2]

    def _goal(self) -> Iterator[str]:
        if more_is_better(self.metric) is (not self.maximise):
            taken, usual = ("more", "less") if self.maximise else ("less", "more")
            yield (
                f"{taken} {self.metric} was taken as better, and by its name {usual} is: "
                f"say maximise={not self.maximise} if so"
            )

    def _not_learned(self) -> str:
        """Whether the metric went the other way at every rank, as it does where the direction is mistaken."""
        worst = [o.metric for o in self.ranks if o.metric is not None and o.metric != self.before]
        if len(worst) < len(self.ranks):
            return "look at the training before the rank"
        less = "less" if self.maximise else "more"
        return f"if {less} is better, say maximise={not self.maximise}; else look at the training before the rank"

    def _ends(self) -> Iterator[str]:
        rank = self.rank
        if len(self.ranks) == 1:
            yield "one rank only was measured"
        elif rank == self.ranks[-1].rank:
            yield f"r={rank} is the largest rank measured; a larger one may gain more (add {2 * rank})"
        elif rank == self.ranks[0].rank and rank > 1:
            yield f"r={rank} is the smallest rank measured; a smaller one may do (add {rank // 2})"

    def _limits(self) -> Iterator[str]:
        """Limits that lie within the noise: another draw of the seeds may decide the other way."""
        for one in self.ranks:
            if one.rank <= self.rank and one.rank in self.shares:
                yield from filter(None, (self._share_in_doubt(one),))
        for step in self.doublings:
            if step.spread is not None and abs(step.gain - self.min_gain) <= step.spread:
                yield (
                    f"{percent(self.min_gain)} lies within the spread of what {step.smaller} -> {step.larger} gains: "
                    f"{percent(step.gain, self.min_gain)} +- {100 * step.spread:.2g} %"
                )

    def _share_in_doubt(self, one: RankOutcome) -> str:
        """Says that noise could move a rank to the other side of the share that is enough."""
        share, wanted = self.shares[one.rank], self.metric_share
        best = (max if self.maximise else min)(self.ranks, key=lambda o: o.metric or 0.0)
        size = abs((best.metric or 0.0) - (self.before or 0.0))
        if one is best or not size:
            return ""
        if one.spread is not None and abs(share - wanted) <= one.spread / size:
            return (
                f"{percent(wanted)} of the best lies within the spread of r={one.rank}: "
                f"{percent(share, wanted)} +- {100 * one.spread / size:.2g} %"
            )
        difference = paired(best, one)
        if one.rank != self.rank or difference is None or not is_enough(share, wanted):
            return ""
        gap = abs(difference[0]) + difference[1]
        if gap <= (1 - wanted) * size:
            return ""
        return (
            f"r={one.rank} may have less than {percent(wanted)} of the best: "
            f"it may be as much as {gap:.3g} behind r={best.rank}"
        )


def indistinct(one: RankOutcome, other: RankOutcome) -> str:
    """Says that two ranks cannot be told apart over their common seeds; empty where they can, or with one seed.

    A paired t-test at 95 %: trials of one seed share the data slice and its order.
    """
    difference = paired(one, other)
    if difference is None:
        return ""
    mean, margin, count = difference
    if abs(mean) > margin or mean == margin == 0:
        return ""
    return (
        f"r={one.rank} and r={other.rank} cannot be told apart over {count} seeds: "
        f"they differ by {abs(mean):.3g}, and less than {margin:.3g} may be chance"
    )


def paired(one: RankOutcome, other: RankOutcome) -> tuple[float, float, int] | None:
    """Mean difference over common seeds, its 95 % margin, and their number; None for fewer than two."""
    differences = common_differences(one, other)
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    freedom = min(len(differences) - 1, len(_T95))
    return statistics.fmean(differences), _T95[freedom - 1] * error, len(differences)
