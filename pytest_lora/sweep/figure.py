"""A sweep as a figure: the numbers that a report of the session shows."""

from __future__ import annotations

from pytest_lora.facts.figures import RankSweep, RankTrial, RatePoint
from pytest_lora.sweep.choice import RankChoice, enough
from pytest_lora.sweep.result import SweepResult
from pytest_lora.sweep.rows import RankOutcome


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
