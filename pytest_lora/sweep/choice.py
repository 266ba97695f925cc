"""Which rank: the practitioners' rules, each with its verdict. Pure functions of numbers.

The rules, and how they are made exact for every kind of metric:

*Metric*: the smallest rank with at least 95 % of the best metric. The share of a rank is that of the best rank's
improvement over the metric before training, ``(metric - before) / (best - before)``, which is the same formula for
metrics to be maximised and minimised, for zero and for negative ones. With ``before = 0`` it is the plain ratio. Where
the metric before training is not known and all metrics are above zero, it is the plain ratio, ``metric / best`` or
``best / metric``; else the rule is not judged.

*Doubling*: go up while doubling the rank pays. A doubling pays when it gains at least ``min_gain`` of the size of the
metric: of the best metric or of its improvement over the metric before training, whichever is larger. Steps other than
doublings are judged by their gain per doubling.

*Time*: less than 70 % of the largest rank's training time. At equal steps rank hardly changes the time, so this rule is
shown and never decides.

The chosen rank is the larger of what the first two name: enough of the best, and no gain left that is worth having.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_lora.facts.sweep import is_enough, percent, rate_text
from pytest_lora.sweep.evidence import Evidence
from pytest_lora.sweep.rows import RankOutcome
from pytest_lora.sweep.verdicts import (
    Verdict,
    deciding,
    doubling_verdict,
    doublings,
    metric_shares,
    metric_verdict,
    stop,
    time_verdict,
)
from pytest_lora.values import require_number, require_share

METRIC_SHARE = 0.95
TIME_SHARE = 0.70
MIN_GAIN = 0.01
"""An accuracy that goes from 92 over 94 to 94.1 gains 2.1 % and then 0.1 %: the first pays, the second does not."""


@dataclass(frozen=True, slots=True)
class RankChoice:
    """A rank, and what speaks for it and against it.

    Attributes:
        rank: The chosen rank.
        reason: Why, in one line.
        verdicts: One a rule: metric, doubling, time.
        runner_up: The rank to take otherwise; None where there is no other.
        runner_up_reason: Why that one.
        unsettled: What the evidence does not settle.
        shares: Share of the best metric, by rank, as the metric rule counts it; empty where it is not judged.
        metric_share: The threshold of the metric rule.
        time_share: The threshold of the time rule.
        min_gain: The threshold of the doubling rule.
        learning_rate: The best rate of the chosen rank; None in a sweep over ranks alone.
        caveats: What keeps one from taking the choice at its word, a few words each; said beside it.
    """

    rank: int
    reason: str
    verdicts: tuple[Verdict, ...]
    runner_up: int | None
    runner_up_reason: str
    unsettled: tuple[str, ...]
    shares: tuple[tuple[int, float], ...]
    metric_share: float = METRIC_SHARE
    time_share: float = TIME_SHARE
    min_gain: float = MIN_GAIN
    learning_rate: float | None = None
    caveats: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """Rank and rate, with what stands against them: ``"r=8 at 3e-4 (not told apart from r=16 over 3 seeds)"``."""
        rate = "" if self.learning_rate is None else f" at {rate_text(self.learning_rate)}"
        return f"r={self.rank}{rate}" + (f" ({'; '.join(self.caveats)})" if self.caveats else "")

    def __str__(self) -> str:
        lines = [f"Choose {self.headline}: {self.reason}."]
        lines += [f"  {verdict}" for verdict in self.verdicts]
        if self.runner_up is not None:
            lines.append(f"Runner-up r={self.runner_up}: {self.runner_up_reason}.")
        if self.unsettled:
            lines += ["The evidence does not settle:", *(f"  - {said}" for said in self.unsettled)]
        return "\n".join(lines)


def enough(
    outcomes: Sequence[RankOutcome], choice: RankChoice, *, before: float | None, maximise: bool
) -> float | None:
    """The metric at which the metric rule is content; None where it was not judged."""
    known = [one.metric for one in outcomes if one.metric is not None]
    if not choice.shares or not known:
        return None
    best = max(known) if maximise else min(known)
    if before is not None:
        return before + choice.metric_share * (best - before)
    return best * choice.metric_share if maximise else best / choice.metric_share


def choose(
    outcomes: Sequence[RankOutcome],
    *,
    before: float | None,
    maximise: bool,
    metric_share: float = METRIC_SHARE,
    time_share: float = TIME_SHARE,
    min_gain: float = MIN_GAIN,
    metric: str = "",
) -> RankChoice:
    """Choose a rank by the rules at the head of this module.

    Args:
        outcomes: One a rank.
        before: The metric before training; None where it is not known.
        maximise: Whether more is better.
        metric_share: Share of the best metric that is enough, above 0 and at most 1.
        time_share: Share of the largest rank's training time, above 0 and at most 1.
        min_gain: Gain of a doubling that pays, as a share of the metric's size, at least 0.
        metric: Name of the metric, which may say that less of it is better.

    Raises:
        TypeError: A threshold is no number.
        ValueError: A threshold is out of its range, or no trial has a metric.
    """
    metric_share = require_share("metric_share", metric_share)
    time_share = require_share("time_share", time_share)
    min_gain = require_number("min_gain", min_gain, least=0.0)
    ranks = sorted((o for o in outcomes if o.metric is not None), key=lambda o: o.rank)
    if not ranks:
        seen = sorted({f"r={o.rank}: {failure}" for o in outcomes for failure in o.failures})
        raise ValueError(
            "no rank can be chosen, as no trial has a metric" + "".join(f"\n  {s}" for s in seen)
        )
    shares = metric_shares(ranks, before, maximise)
    by_metric = next((rank for rank, share in shares.items() if is_enough(share, metric_share)), None)
    steps = doublings(ranks, before, maximise)
    by_doubling = stop(ranks[0].rank, steps, min_gain)
    rank = max(by_metric or 0, by_doubling)
    verdicts = (
        metric_verdict(ranks, shares, by_metric, rank, metric_share, before),
        doubling_verdict(ranks[0].rank, steps, rank, min_gain),
        time_verdict(ranks, shares, rank, metric_share, time_share),
    )
    runner_up, why = _runner_up(ranks, shares, rank, verdicts, metric_share)
    evidence = Evidence(
        outcomes=tuple(outcomes),
        ranks=tuple(ranks),
        rank=rank,
        shares=shares,
        doublings=deciding(steps, min_gain),
        before=before,
        maximise=maximise,
        metric_share=metric_share,
        min_gain=min_gain,
        metric=metric,
    )
    return RankChoice(
        rank=rank,
        reason=_reason(rank, by_metric, by_doubling, shares, rank == ranks[-1].rank, metric_share),
        verdicts=verdicts,
        runner_up=runner_up,
        runner_up_reason=why,
        unsettled=tuple(evidence.unsettled()),
        shares=tuple(shares.items()),
        metric_share=metric_share,
        time_share=time_share,
        min_gain=min_gain,
        learning_rate=evidence.chosen.learning_rate,
        caveats=tuple(evidence.caveats()),
    )


def _reason(
    rank: int,
    by_metric: int | None,
    by_doubling: int,
    shares: dict[int, float],
    is_largest: bool,
    wanted: float,
) -> str:
    if by_metric is None:
        return "doubling pays up to here and no further, and the metric rule could not be judged"
    share = f"it has {percent(shares[rank], wanted)} of the best"
    if by_metric == by_doubling:
        last = "and no larger one was measured" if is_largest else "and doubling it does not pay"
        return f"{share}, no smaller rank has enough, {last}"
    if rank == by_doubling:
        return f"{share}; r={by_metric} has enough too, but doubling pays up to here"
    little = percent(shares[by_doubling], wanted)
    return f"{share}; doubling stops paying at r={by_doubling} already, which has too little, {little}"


def _runner_up(
    ranks: Sequence[RankOutcome],
    shares: dict[int, float],
    rank: int,
    verdicts: Sequence[Verdict],
    wanted: float,
) -> tuple[int | None, str]:
    others = [o for o in ranks if o.rank != rank]
    if not others:
        return None, ""

    def beside(other: int) -> str:
        return f", with {percent(shares[other], wanted)} of the best" if other in shares else ""

    for verdict in verdicts:
        if verdict.rank not in (None, rank):
            return verdict.rank, f"the {verdict.rule} rule alone would take it{beside(verdict.rank or 0)}"
    larger = [o for o in others if o.rank > rank]
    if larger:
        return larger[0].rank, f"the next larger one{beside(larger[0].rank)}"
    return others[-1].rank, f"the next smaller one{beside(others[-1].rank)}"
