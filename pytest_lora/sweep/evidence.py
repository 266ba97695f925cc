"""What the evidence of a sweep does not settle: noise between seeds, edges of the grid, trials that failed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from pytest_lora.facts.sweep import percent
from pytest_lora.sweep.rows import RankOutcome

_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom; the last also stands for more."""


def unsettled_by(
    outcomes: Sequence[RankOutcome],
    ranks: Sequence[RankOutcome],
    shares: dict[int, float],
    rank: int,
    before: float | None,
    maximise: bool,
    metric_share: float,
) -> Iterator[str]:
    """Yield what the measured ranks leave open about the chosen one."""
    chosen = next(o for o in ranks if o.rank == rank)
    if len(chosen.metrics) < 2:
        yield "one seed a rank shows no noise: differences between ranks may be chance (seeds=3 or more tells)"
    position = ranks.index(chosen)
    for other in (*ranks[max(0, position - 1) : position], *ranks[position + 1 : position + 2]):
        if noise := indistinct(chosen, other):
            yield noise
    if shares and (doubt := _share_in_doubt(chosen, ranks, before, maximise, metric_share)):
        yield doubt
    if not shares and before is not None:
        yield "no rank is better than the metric before training: look at the training before the rank"
    if len(ranks) == 1:
        yield "one rank only was measured"
    elif rank == ranks[-1].rank:
        yield f"r={rank} is the largest rank measured; a larger one may gain more (add {2 * rank})"
    elif rank == ranks[0].rank and rank > 1:
        yield f"r={rank} is the smallest rank measured; a smaller one may do (add {rank // 2})"
    for outcome in outcomes:
        if outcome.failures:
            kinds = ", ".join(sorted({failure.kind for failure in outcome.failures}))
            missing = len(outcome.failures)
            yield f"r={outcome.rank} lacks {missing} of {missing + len(outcome.metrics)} trials ({kinds})"


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
    left, right = dict(one.metrics), dict(other.metrics)
    differences = [left[seed] - right[seed] for seed in left if seed in right]
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    freedom = min(len(differences) - 1, len(_T95))
    return statistics.fmean(differences), _T95[freedom - 1] * error, len(differences)


def _share_in_doubt(
    chosen: RankOutcome,
    ranks: Sequence[RankOutcome],
    before: float | None,
    maximise: bool,
    wanted: float,
) -> str:
    """Says that noise could push the chosen rank below its share of the best."""
    best = (max if maximise else min)(ranks, key=lambda o: o.metric or 0.0)
    difference = paired(best, chosen) if best is not chosen else None
    if difference is None or best.metric is None:
        return ""
    size = abs(best.metric - (before or 0.0))
    gap = abs(difference[0]) + difference[1]
    if not size or gap <= (1 - wanted) * size:
        return ""
    return (
        f"r={chosen.rank} may have less than {percent(wanted)} of the best: "
        f"it may be as much as {gap:.3g} behind r={best.rank}"
    )
