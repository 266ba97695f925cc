"""A locked rank under test: fails when it no longer suffices."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_lora.arguments import require_expect, require_share, require_whole
from pytest_lora.assertions import asserting
from pytest_lora.checks.judging import report_on
from pytest_lora.expect import Expect
from pytest_lora.facts.sweep import LockedRankFacts, MeasuredRank
from pytest_lora.findings import Report
from pytest_lora.rules.selection import codes
from pytest_lora.sweep.choice import METRIC_SHARE
from pytest_lora.sweep.figure import figure_of
from pytest_lora.sweep.result import SweepResult
from pytest_lora.sweep.rows import RankOutcome
from pytest_lora.sweep.table import number


def check_rank_suffices(
    result: SweepResult,
    rank: int,
    metric_share: float = METRIC_SHARE,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether a locked rank still reaches 95 % of the best metric.

    The share is that of the metric rule (``pytest_lora.sweep.choice``): of the best rank's improvement over the metric
    before training.

    Args:
        result: A sweep that has this rank and larger ones.
        rank: The locked rank.
        metric_share: The share that is enough, above 0 and at most 1.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report, subject "rank 8 for accuracy", with LORA940 where it has too little, or LORA941 where it cannot be
        judged.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The sweep did not measure this rank, ``metric_share`` is out of its range, or a code does not exist.
    """
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    if not isinstance(result, SweepResult):
        raise TypeError(f"result must be a SweepResult, not {type(result).__name__}")
    require_whole("rank", rank)
    wanted = require_share("metric_share", metric_share)
    rows = {row.rank: row for row in result.rows}
    if rank not in rows:
        raise ValueError(f"rank: r={rank} was not measured; the sweep has {', '.join(map(str, rows))}")
    shares = result.shares()
    facts = LockedRankFacts(
        metric=result.metric,
        rank=rank,
        wanted=wanted,
        before=None if result.before is None else number(result.before),
        ranks=tuple(_measured(row, shares.get(row.rank)) for row in rows.values()),
    )
    subject = f"rank {rank} for {result.metric}"
    return report_on(subject, [facts], expect, select, ignore, (figure_of(result),))


assert_rank_suffices = asserting(check_rank_suffices, "assert_rank_suffices")


def _measured(row: RankOutcome, share: float | None) -> MeasuredRank:
    metric = None
    if row.metric is not None:
        metric = number(row.metric) + ("" if row.spread is None else f" +- {row.spread:.2g}")
    return MeasuredRank(row.rank, share, metric, tuple(sorted({str(failure) for failure in row.failures})))
