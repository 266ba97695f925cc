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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_lora.arguments import require_number, require_share
from pytest_lora.facts.sweep import is_enough, percent
from pytest_lora.sweep.evidence import unsettled_by
from pytest_lora.sweep.rows import RankOutcome

METRIC_SHARE = 0.95
TIME_SHARE = 0.70
MIN_GAIN = 0.01
"""An accuracy that goes from 92 over 94 to 94.1 gains 2.1 % and then 0.1 %: the first pays, the second does not."""

RuleName = Literal["metric", "doubling", "time"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule says.

    Attributes:
        rule: ``"metric"``, ``"doubling"`` or ``"time"``.
        rank: The rank that this rule alone would choose; None where it names none.
        holds: Whether the chosen rank satisfies the rule; None where it could not be judged.
        reason: The numbers behind it.
    """

    rule: RuleName
    rank: int | None
    holds: bool | None
    reason: str

    @property
    def said(self) -> str:
        """``holds`` in words."""
        return {True: "holds", False: "does not hold", None: "not judged"}[self.holds]

    def __str__(self) -> str:
        return f"{self.rule:<8}  {self.said:<13}  {self.reason}"


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

    def __str__(self) -> str:
        lines = [f"Choose r={self.rank}: {self.reason}."]
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
) -> RankChoice:
    """Choose a rank by the rules at the head of this module.

    Args:
        outcomes: One a rank.
        before: The metric before training; None where it is not known.
        maximise: Whether more is better.
        metric_share: Share of the best metric that is enough, above 0 and at most 1.
        time_share: Share of the largest rank's training time, above 0 and at most 1.
        min_gain: Gain of a doubling that pays, as a share of the metric's size, at least 0.

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
    by_doubling, stops = _stop(ranks, before, maximise, min_gain)
    rank = max(by_metric or 0, by_doubling)
    verdicts = (
        _metric_verdict(ranks, shares, by_metric, rank, metric_share, before),
        Verdict("doubling", by_doubling, rank == by_doubling, stops),
        _time_verdict(ranks, shares, rank, metric_share, time_share),
    )
    runner_up, why = _runner_up(ranks, shares, rank, verdicts)
    return RankChoice(
        rank=rank,
        reason=_reason(rank, by_metric, by_doubling, shares, rank == ranks[-1].rank),
        verdicts=verdicts,
        runner_up=runner_up,
        runner_up_reason=why,
        unsettled=tuple(unsettled_by(outcomes, ranks, shares, rank, before, maximise, metric_share)),
        shares=tuple(shares.items()),
        metric_share=metric_share,
        time_share=time_share,
        min_gain=min_gain,
    )


def metric_shares(ranks: Sequence[RankOutcome], before: float | None, maximise: bool) -> dict[int, float]:
    """Share of the best metric by rank, as the metric rule counts it; empty where that means nothing."""
    values = {o.rank: o.metric for o in ranks if o.metric is not None}
    if not values:
        return {}
    best = max(values.values()) if maximise else min(values.values())
    if before is not None:
        improvement = best - before
        learned = improvement > 0 if maximise else improvement < 0
        if not learned or not math.isfinite(improvement):
            return {}
        return {rank: (value - before) / improvement for rank, value in values.items()}
    if min(values.values()) <= 0:
        return {}
    return {rank: value / best if maximise else best / value for rank, value in values.items()}


def _stop(
    ranks: Sequence[RankOutcome], before: float | None, maximise: bool, min_gain: float
) -> tuple[int, str]:
    """Where doubling stops paying, and the gains behind it."""
    sign = 1 if maximise else -1
    values = {o.rank: sign * o.metric for o in ranks if o.metric is not None}
    best = max(values.values())
    improvement = 0.0 if before is None else best - sign * before
    size = max(abs(best), abs(improvement))
    current, said = ranks[0].rank, []
    for smaller, larger in zip(values, list(values)[1:], strict=False):
        gain = (values[larger] - values[smaller]) / math.log2(larger / smaller) / size if size else 0.0
        pays = gain >= min_gain and gain > 0
        said.append(f"{smaller} -> {larger} gains {percent(gain)}")
        if not pays:
            break
        current = larger
    if not said:
        return current, "there is one rank only"
    wanted = f"a doubling is to gain {percent(min_gain)}"
    return current, f"{', '.join(said)}; {wanted}"


def _metric_verdict(
    ranks: Sequence[RankOutcome],
    shares: dict[int, float],
    pick: int | None,
    rank: int,
    wanted: float,
    before: float | None,
) -> Verdict:
    if not shares:
        why = (
            "no rank is better than the metric before training"
            if before is not None
            else "the metric before training is not known, and not all metrics are above zero"
        )
        return Verdict("metric", None, None, why)
    of_what = "of the best metric" if before is None else "of the best improvement over the metric before"
    said = ", ".join(f"{o.rank}: {percent(shares[o.rank])}" for o in ranks)
    return Verdict(
        "metric", pick, is_enough(shares[rank], wanted), f"{said} {of_what}; {percent(wanted)} is enough"
    )


def _time_verdict(
    ranks: Sequence[RankOutcome],
    shares: dict[int, float],
    rank: int,
    metric_share: float,
    wanted: float,
) -> Verdict:
    seconds = {o.rank: o.seconds for o in ranks if o.seconds is not None}
    largest = max(seconds, default=0)
    if rank not in seconds or len(seconds) < 2 or not seconds[largest]:
        return Verdict("time", None, None, "there are no times of two ranks to compare")
    ratios = {r: s / seconds[largest] for r, s in seconds.items()}
    quick = [r for r in ratios if ratios[r] < wanted and is_enough(shares.get(r, 0.0), metric_share)]
    taken = (
        "is the largest" if rank == largest else f"takes {percent(ratios[rank])} of the time of r={largest}"
    )
    said = f"r={rank} {taken}; under {percent(wanted)} is asked for"
    if ratios[rank] < wanted:
        return Verdict("time", rank, True, said)
    if quick:
        said += f", as r={quick[0]} does"
    else:
        said += ", which at equal steps hardly any rank does"
    return Verdict("time", quick[0] if quick else None, False, f"{said}; it does not decide")


def _reason(
    rank: int, by_metric: int | None, by_doubling: int, shares: dict[int, float], is_largest: bool
) -> str:
    if by_metric is None:
        return "doubling pays up to here and no further, and the metric rule could not be judged"
    share = f"it has {percent(shares[rank])} of the best"
    if by_metric == by_doubling:
        last = "and no larger one was measured" if is_largest else "and doubling it does not pay"
        return f"{share}, no smaller rank has enough, {last}"
    if rank == by_doubling:
        return f"{share}; r={by_metric} has enough too, but doubling pays up to here"
    return f"{share}; doubling stops paying at r={by_doubling} already, which has too little"


def _runner_up(
    ranks: Sequence[RankOutcome],
    shares: dict[int, float],
    rank: int,
    verdicts: Sequence[Verdict],
) -> tuple[int | None, str]:
    others = [o for o in ranks if o.rank != rank]
    if not others:
        return None, ""

    def beside(other: int) -> str:
        return f", with {percent(shares[other])} of the best" if other in shares else ""

    for verdict in verdicts:
        if verdict.rank not in (None, rank):
            return verdict.rank, f"the {verdict.rule} rule alone would take it{beside(verdict.rank or 0)}"
    larger = [o for o in others if o.rank > rank]
    if larger:
        return larger[0].rank, f"the next larger one{beside(larger[0].rank)}"
    return others[-1].rank, f"the next smaller one{beside(others[-1].rank)}"
