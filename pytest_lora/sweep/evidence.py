"""What the evidence of a sweep does not settle: noise between seeds, limits within it, edges of the grid, failures."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_lora.facts.sweep import is_enough, percent, rate_text
from pytest_lora.sweep.rows import RankOutcome, RateOutcome
from pytest_lora.sweep.verdicts import Doubling, common_differences

LESS = {
    *("loss", "losses", "nll", "perplexity", "ppl", "error", "errors", "err", "wer", "cer", "ter"),
    *("mse", "rmse", "mae", "mape", "bpb", "bpc", "brier", "ece", "fid"),
}
MORE = {
    *("accuracy", "acc", "f1", "precision", "recall", "auc", "auroc", "mcc", "mrr", "ndcg", "em"),
    *("bleu", "sacrebleu", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "meteor", "chrf", "bertscore"),
    *("reward", "rewards"),
}
"""Names of the metrics of Hugging Face's evaluate and of lm-evaluation-harness, and of the losses of training."""


def more_is_better(metric: str) -> bool | None:
    """Whether more of a metric is better; None where its name does not say, or says both."""
    words = set(re.findall(r"[a-z]+[0-9]*", re.sub(r"([a-z])([A-Z])(?=[a-z])", r"\1 \2", metric).lower()))
    less, more = bool(words & LESS), bool(words & MORE)
    return None if less == more else more


def about_rates(ranks: Sequence[RankOutcome], chosen: int) -> Iterator[str]:
    """Yield what keeps the comparison of ranks from being one of ranks alone.

    Args:
        ranks: The ranks that have a metric.
        chosen: The chosen one of them.
    """
    if all(len(o.rates) < 2 for o in ranks):
        if len(ranks) > 1:
            yield (
                "one learning rate for all ranks: a rank that wants another one looks worse than it is "
                "(learning_rates=(...) tells)"
            )
        return
    if alike := [o.rank for o in ranks if _are_alike(o.rates)]:
        yield (
            f"several rates gave the same numbers to the last digit at {_names(alike)}: "
            "does train use plan.learning_rate?"
        )
        return
    yield from _edges(ranks)
    one = next(o for o in ranks if o.rank == chosen)
    if dropped := [rate for rate in one.rates if rate.budget < 1]:
        whole = max(rate.steps for rate in one.rates if rate.budget == 1)
        if whole > 1 and max(rate.steps for rate in dropped) >= whole:
            yield "the short trainings had as many steps as the full ones: does train use plan.share?"
        shortest = min(rate.budget for rate in dropped)
        yield (
            f"{len(dropped)} of {len(one.rates)} rates of r={chosen} were dropped after {100 * shortest:.3g} % of the "
            "training, and short trainings favour large rates"
        )


def _are_alike(rates: Sequence[RateOutcome]) -> bool:
    seen = [(rate.budget, rate.metrics) for rate in rates if rate.metrics]
    return len(set(seen)) < len(seen)


def edge_of(one: RankOutcome) -> str:
    """Says that a rank's best rate lies at the edge of the grid, and what to try; empty where it does not."""
    rates = [rate.learning_rate for rate in one.rates]
    if len(rates) < 2 or one.learning_rate not in (rates[0], rates[-1]):
        return ""
    edge, inner, word = (
        (rates[-1], rates[-2], "largest")
        if one.learning_rate == rates[-1]
        else (rates[0], rates[1], "smallest")
    )
    return f"the {word} rate tried: try {rate_text(_rounded(edge * edge / inner))}"


def _edges(ranks: Sequence[RankOutcome]) -> Iterator[str]:
    """A line for each edge of the grid at which a rank has its best rate."""
    found: dict[str, list[int]] = {}
    for one in ranks:
        if said := edge_of(one):
            found.setdefault(f"{rate_text(one.learning_rate or 0.0)}, {said}", []).append(one.rank)
    for said, at in found.items():
        yield f"the best rate of {_names(at)} is {said}"


def _rounded(rate: float) -> float:
    """With one digit, as grids of rates are written."""
    return float(f"{rate:.0e}")


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(f"r={rank}" for rank in ranks)


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
