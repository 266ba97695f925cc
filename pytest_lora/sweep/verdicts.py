"""The verdict of each rule: metric, doubling, time; ``pytest_lora.sweep.choice`` says what they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pytest_lora.facts.sweep import is_enough, percent
from pytest_lora.sweep.rows import RankOutcome

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
class Doubling:
    """A step from one rank to the next larger one.

    Attributes:
        smaller: The one.
        larger: The other.
        gain: What the step gains per doubling, as a share of the metric's size.
        spread: Standard deviation of that over common seeds (with n - 1); None for fewer than two.
    """

    smaller: int
    larger: int
    gain: float
    spread: float | None

    def pays(self, min_gain: float) -> bool:
        """Whether it gains enough."""
        return self.gain > 0 and is_enough(self.gain, min_gain)


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


def doublings(ranks: Sequence[RankOutcome], before: float | None, maximise: bool) -> tuple[Doubling, ...]:
    """Every step to the next larger rank, with what it gains."""
    sign = 1 if maximise else -1
    values = [sign * o.metric for o in ranks if o.metric is not None]
    best = max(values)
    improvement = 0.0 if before is None else best - sign * before
    size = max(abs(best), abs(improvement))
    return tuple(_doubling(one, other, sign, size) for one, other in pairwise(ranks))


def _doubling(one: RankOutcome, other: RankOutcome, sign: int, size: float) -> Doubling:
    unit = math.log2(other.rank / one.rank) * size * sign
    differences = common_differences(other, one)
    return Doubling(
        one.rank,
        other.rank,
        ((other.metric or 0.0) - (one.metric or 0.0)) / unit if size else 0.0,
        statistics.stdev(differences) / abs(unit) if size and len(differences) > 1 else None,
    )


def common_differences(one: RankOutcome, other: RankOutcome) -> list[float]:
    """Metric of the one less that of the other, for every seed that both have."""
    left, right = dict(one.metrics), dict(other.metrics)
    return [left[seed] - right[seed] for seed in left if seed in right]


def deciding(steps: Sequence[Doubling], min_gain: float) -> tuple[Doubling, ...]:
    """The steps up to the first that does not pay, which is the last of them."""
    taken: list[Doubling] = []
    for step in steps:
        taken.append(step)
        if not step.pays(min_gain):
            break
    return tuple(taken)


def doubling_verdict(smallest: int, steps: Sequence[Doubling], rank: int, min_gain: float) -> Verdict:
    """Of the rank where doubling stops paying."""
    pick = stop(smallest, steps, min_gain)
    if not steps:
        return Verdict("doubling", pick, rank == pick, "there is one rank only")
    said = ", ".join(
        f"{step.smaller} -> {step.larger} gains {percent(step.gain, min_gain)}"
        for step in deciding(steps, min_gain)
    )
    return Verdict("doubling", pick, rank == pick, f"{said}; a doubling is to gain {percent(min_gain)}")


def stop(smallest: int, steps: Sequence[Doubling], min_gain: float) -> int:
    """Where doubling stops paying."""
    return max((step.larger for step in deciding(steps, min_gain) if step.pays(min_gain)), default=smallest)


def metric_verdict(
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
    said = ", ".join(f"{o.rank}: {percent(shares[o.rank], wanted)}" for o in ranks)
    return Verdict(
        "metric", pick, is_enough(shares[rank], wanted), f"{said} {of_what}; {percent(wanted)} is enough"
    )


def time_verdict(
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
        "is the largest"
        if rank == largest
        else f"takes {percent(ratios[rank], wanted)} of the time of r={largest}"
    )
    said = f"r={rank} {taken}; under {percent(wanted)} is asked for"
    if ratios[rank] < wanted:
        return Verdict("time", rank, True, said)
    if quick:
        said += f", as r={quick[0]} does"
    else:
        said += ", which at equal steps hardly any rank does"
    return Verdict("time", quick[0] if quick else None, False, f"{said}; it does not decide")
