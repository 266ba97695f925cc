"""A locked rank under test: fails when it no longer suffices."""

from __future__ import annotations

from typing import Any

from pytest_lora.assertions import demand
from pytest_lora.findings import Finding, Report
from pytest_lora.sweep.choice import METRIC_SHARE, is_enough, percent, require_share
from pytest_lora.sweep.figure import exhibited
from pytest_lora.sweep.result import SweepResult
from pytest_lora.sweep.table import number


def check_rank_suffices(result: SweepResult, rank: int, metric_share: float = METRIC_SHARE) -> Report:
    """Judge whether a rank reaches its share of the best metric; see ``assert_rank_suffices``.

    Returns:
        A report, with LORA940 where it does not, or LORA941 where it cannot be told.
    """
    if not isinstance(result, SweepResult):
        raise TypeError(f"result must be a SweepResult, not {type(result).__name__}")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be a whole number, not {rank!r}")
    wanted = require_share("metric_share", metric_share)
    ranks = [row.rank for row in result.rows]
    if rank not in ranks:
        raise ValueError(f"rank: r={rank} was not measured; the sweep has {', '.join(map(str, ranks))}")
    finding = _finding(result, rank, wanted)
    subject = f"rank {rank} for {result.metric}"
    return Report(subject, () if finding is None else (finding,), (exhibited(result),))


def assert_rank_suffices(result: SweepResult, rank: int, metric_share: float = METRIC_SHARE) -> Report:
    """Assert that a locked rank still reaches 95 % of the best metric.

    The share is that of the metric rule (``pytest_lora.sweep.choice``): of the best rank's improvement over the metric
    before training.

    Args:
        result: A sweep that has this rank and larger ones.
        rank: The locked rank.
        metric_share: The share that is enough, above 0 and at most 1.

    Returns:
        The report, subject "rank 8 for accuracy".

    Raises:
        LoraHealthError: The rank has too little (LORA940), or no share can be told (LORA941).
        TypeError: An argument has the wrong type.
        ValueError: The sweep did not measure this rank, or ``metric_share`` is out of its range.
    """
    __tracebackhide__ = True
    return demand(check_rank_suffices(result, rank, metric_share))


def _finding(result: SweepResult, rank: int, wanted: float) -> Finding | None:
    rows = {row.rank: row for row in result.rows}
    shares = result.shares()
    where = f"r={rank} of a sweep over {', '.join(f'r={r}' for r in rows)}"
    if rank not in shares:
        return _untold(result, where, rows[rank])
    if is_enough(shares[rank], wanted):
        return None
    best = max(shares, key=lambda other: shares[other])
    enough = min(other for other, share in shares.items() if is_enough(share, wanted))
    observed = (
        f"{result.metric} is {_said(rows[rank])} at r={rank} and {_said(rows[best])} at r={best}, "
        f"{percent(shares[rank])} of the best"
    )
    return Finding(
        code="LORA940",
        rule="rank_no_longer_suffices",
        severity="error",
        where=where,
        observed=observed
        if result.before is None
        else f"{observed}, counted from {number(result.before)} before",
        expected=f"at least {percent(wanted)} of the best",
        fix=f"r={enough} has {percent(shares[enough])}: lock that, or look at what changed in the data",
    )


def _untold(result: SweepResult, where: str, row: Any) -> Finding:
    failures = "; ".join(sorted({str(failure) for failure in row.failures}))
    if row.metric is None:
        observed, fix = f"no trial of this rank has a metric: {failures}", "mend what failed, and sweep again"
    elif result.before is None:
        observed = "the metric before training is not known, and not all metrics are above zero"
        fix = "look at why evaluate failed before training"
    else:
        observed = f"no rank is better than the {number(result.before)} before training"
        fix = "look at the training before the rank: assert_loss_decreases says whether it learns"
    return Finding("LORA941", "rank_can_not_be_judged", "error", where, observed, "a share of the best", fix)


def _said(row: Any) -> str:
    spread = "" if row.spread is None else f" +- {row.spread:.2g}"
    return f"{number(row.metric)}{spread}"
