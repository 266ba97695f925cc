"""A locked rank under test: fails when it no longer suffices, or is no longer what is trained with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import refusing, require_expect
from pytest_lora.assertions import asserting
from pytest_lora.checks import report_on
from pytest_lora.expect import Expect
from pytest_lora.facts.figures import RankSweep, RankTrial, RatePoint
from pytest_lora.facts.sweep import LockedRankFacts, MeasuredRank, RankLockFacts
from pytest_lora.findings import Report
from pytest_lora.rules.selection import codes
from pytest_lora.sweep.choice import METRIC_SHARE, RankChoice, enough
from pytest_lora.sweep.lock import RankLock, drift, in_use
from pytest_lora.sweep.result import SweepResult
from pytest_lora.sweep.rows import RankOutcome
from pytest_lora.sweep.views import number
from pytest_lora.values import in_short, require_number, require_path, require_share, require_whole, shown

if TYPE_CHECKING:
    from peft import LoraConfig


@refusing
def check_rank_suffices(
    result: SweepResult | RankLock | str | os.PathLike[str],
    rank: int | RankLock | str | os.PathLike[str] | None = None,
    metric_share: float = METRIC_SHARE,
    *,
    config: LoraConfig | None = None,
    learning_rate: float | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether a locked rank still reaches 95 % of the best metric, and is what is trained with.

    The share is that of the metric rule (``pytest_lora.sweep.choice``): of the best rank's improvement over the metric
    before training.

    Args:
        result: A sweep that has this rank and larger ones; or a lock, or its file (``"rank.json"``), whose own
            evidence is then judged.
        rank: The locked rank, or the lock that has it; not needed where ``result`` is one.
        metric_share: The share that is enough, above 0 and at most 1.
        config: The adapter in use, which is to have the rank and alpha of the lock.
        learning_rate: The rate in use, which is to be that of the lock, where the sweep tried several.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report, subject "rank 8 for accuracy", with LORA940 where it has too little, LORA941 where it cannot be
        judged, LORA942 where something else is in use, or LORA943 where the evidence is of other data or versions.

    Raises:
        TypeError: An argument has the wrong type; or there is no rank, or ``config`` without a lock.
        ValueError: The sweep did not measure this rank, a file is no lock, a number is out of its range, or a code does
            not exist.
    """
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    sweep, lock, name = _evidence(result, rank)
    if lock is None and (config is not None or learning_rate is not None):
        raise TypeError("config= and learning_rate= are compared with a lock; give one, such as 'rank.json'")
    if config is not None and not (hasattr(config, "r") and hasattr(config, "lora_alpha")):
        raise TypeError(f"config must be a peft.LoraConfig, not {type(config).__name__}")
    if learning_rate is not None:
        require_number("learning_rate", learning_rate, above=0.0)
    locked = require_whole("rank", rank if lock is None else lock.rank)
    subjects: list[Any] = [_measured_beside(sweep, locked, require_share("metric_share", metric_share))]
    if lock is not None:
        fresh = sweep if isinstance(result, SweepResult) else None
        subjects.append(
            RankLockFacts(
                name, lock.rank, tuple(in_use(lock, config, learning_rate)), tuple(drift(lock, fresh))
            )
        )
    subject = f"rank {locked} for {sweep.metric}"
    return report_on(subject, subjects, expect, select, ignore, (figure_of(sweep),))


assert_rank_suffices = asserting(check_rank_suffices, "assert_rank_suffices")


def _evidence(result: Any, rank: Any) -> tuple[SweepResult, RankLock | None, str]:
    """The sweep that is judged, the lock if there is one, and what to call it."""
    lock, name = _lock("rank", rank)
    if isinstance(result, SweepResult):
        if rank is None:
            raise TypeError("rank is missing: the rank in use, or the lock that has it")
        return result, lock, name
    own, own_name = _lock("result", result)
    if own is None:
        raise TypeError(f"result must be a SweepResult, a RankLock or the path of one, not {shown(result)}")
    if rank is not None:
        raise TypeError("rank is in the lock already; leave it out, or give a fresh sweep before it")
    return SweepResult.from_json(own.evidence), own, own_name


def _lock(argument: str, given: Any) -> tuple[RankLock | None, str]:
    if isinstance(given, RankLock):
        return given, "the lock"
    if isinstance(given, (str, os.PathLike)):
        path = require_path(argument, given)
        try:
            return RankLock.read(path), str(path)
        except ValueError as error:
            raise ValueError(f"{argument}: {in_short(error)}") from error
    return None, ""


def _measured_beside(sweep: SweepResult, rank: int, wanted: float) -> LockedRankFacts:
    rows = {row.rank: row for row in sweep.rows}
    if rank not in rows:
        raise ValueError(f"rank: r={rank} was not measured; the sweep has {', '.join(map(str, rows))}")
    shares = sweep.shares()
    return LockedRankFacts(
        metric=sweep.metric,
        rank=rank,
        wanted=wanted,
        before=None if sweep.before is None else number(sweep.before),
        ranks=tuple(_measured(row, shares.get(row.rank)) for row in rows.values()),
    )


def _measured(row: RankOutcome, share: float | None) -> MeasuredRank:
    metric = None
    if row.metric is not None:
        metric = number(row.metric) + ("" if row.spread is None else f" +- {row.spread:.2g}")
    return MeasuredRank(row.rank, share, metric, tuple(sorted({str(failure) for failure in row.failures})))


def figure_of(result: SweepResult) -> RankSweep:
    """The sweep with its choice; without one where no trial has a metric."""
    measured = any(row.metric is not None for row in result.rows)
    choice = result.choose() if measured else None
    return RankSweep(
        title=result.settings.get("data") or result.metric,
        metric=result.metric,
        maximise=result.maximise,
        trials=tuple(_trial(row) for row in result.rows),
        chosen=choice.rank if choice else None,
        reasons=_reasons(choice) if choice else (),
        enough=enough(result.rows, choice, before=result.before, maximise=result.maximise)
        if choice
        else None,
    )


def _reasons(choice: RankChoice) -> tuple[str, ...]:
    runner_up = (
        () if choice.runner_up is None else (f"runner-up r={choice.runner_up}: {choice.runner_up_reason}",)
    )
    unsettled = tuple(f"not settled: {said}" for said in choice.unsettled)
    verdicts = (f"{one.rule} rule {one.said}; {one.reason}" for one in choice.verdicts)
    return (f"{choice.headline}: {choice.reason}", *verdicts, *runner_up, *unsettled)


def _trial(row: RankOutcome) -> RankTrial:
    problem = "" if row.metric is not None else "; ".join(sorted({str(failure) for failure in row.failures}))
    return RankTrial(
        rank=row.rank,
        metric=row.metric,
        spread=row.spread,
        seconds=row.seconds or 0.0,
        flops=row.flops,
        peak_bytes=row.peak_bytes,
        trainable_parameters=row.trainable or 0,
        problem=problem,
        rate=row.learning_rate,
        rates=tuple(RatePoint(r.learning_rate, r.metric, r.spread, r.budget == 1) for r in row.rates),
    )
