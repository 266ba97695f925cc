"""What a sweep has measured: a row a trial, and a row a rank. Plain data, no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pytest_lora.findings import Finding

FailureKind = Literal["out of memory", "diverged", "no metric", "worker died", "error"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a trial has no metric.

    Attributes:
        kind: ``"out of memory"``, ``"diverged"`` (a loss or the metric is not finite), ``"no metric"`` (``evaluate``
            gave no number), ``"worker died"`` or ``"error"``.
        message: What was seen.
        advice: The change to try.
    """

    kind: FailureKind
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}; {self.advice}"


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial, finished or failed.

    Attributes:
        rank: ``r``.
        alpha: ``lora_alpha``.
        seed: The trial's seed.
        metric: What ``evaluate`` gave after training; None where the trial failed.
        losses: What ``train`` returned, in order.
        seconds: Wall time of ``train``.
        flops: Floating-point operations of ``train`` as torch counts them; None where nothing was counted.
        peak_bytes: Peak of GPU memory: measured on a GPU, else estimated for a step like the largest seen.
        memory: ``"measured"``, ``"estimated"``, or why there is no number.
        trainable: Trainable parameters.
        data: The slice that ``plan.share`` drew, such as ``"40 of 400"``; empty where it was not used.
        device: Where the model was, such as ``"cpu"`` or ``"cuda:0"``.
        findings: What ``check_model`` and ``diagnose_history`` found after training.
        failure: Why there is no metric.
    """

    rank: int
    alpha: float
    seed: int
    metric: float | None = None
    losses: tuple[float, ...] = ()
    seconds: float | None = None
    flops: int | None = None
    peak_bytes: int | None = None
    memory: str = ""
    trainable: int | None = None
    data: str = ""
    device: str = ""
    findings: tuple[Finding, ...] = ()
    failure: Failure | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON, in which numbers that are not finite are words."""
        data = asdict(self)
        data["losses"] = [loss if math.isfinite(loss) else str(loss) for loss in self.losses]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrialRow:
        """The row that ``to_dict`` gave."""
        failure = data.get("failure")
        return cls(
            **data
            | {
                "losses": tuple(float(loss) for loss in data.get("losses", ())),
                "findings": tuple(Finding(**finding) for finding in data.get("findings", ())),
                "failure": Failure(**failure) if failure else None,
            }
        )


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """All trials of one rank; means are over the trials that have a metric.

    Attributes:
        rank: ``r``.
        alpha: ``lora_alpha``.
        metrics: Metric by seed, of the trials that have one, in order of the seeds.
        metric: Their mean, None where every trial failed.
        spread: Their standard deviation (with n - 1), None for fewer than two.
        seconds: Mean wall time of training.
        flops: Mean operations of training.
        peak_bytes: The highest peak.
        memory: How the peak is known.
        trainable: Trainable parameters.
        failures: What went wrong in the other trials.
    """

    rank: int
    alpha: float
    metrics: tuple[tuple[int, float], ...]
    metric: float | None
    spread: float | None
    seconds: float | None
    flops: float | None
    peak_bytes: int | None
    memory: str
    trainable: int | None
    failures: tuple[Failure, ...]


def outcomes(rows: Iterable[TrialRow]) -> tuple[RankOutcome, ...]:
    """One outcome a rank, the smallest rank first."""
    by_rank: dict[int, list[TrialRow]] = {}
    for row in rows:
        by_rank.setdefault(row.rank, []).append(row)
    return tuple(_outcome(by_rank[rank]) for rank in sorted(by_rank))


def _outcome(rows: list[TrialRow]) -> RankOutcome:
    rows = sorted(rows, key=lambda row: row.seed)
    done = [row for row in rows if row.metric is not None]
    values = [row.metric for row in done if row.metric is not None]
    peaks = [row for row in done if row.peak_bytes is not None]
    highest = max(peaks, key=lambda row: row.peak_bytes or 0, default=None)
    known = next((row.memory for row in done), "")
    return RankOutcome(
        rank=rows[0].rank,
        alpha=rows[0].alpha,
        metrics=tuple((row.seed, row.metric) for row in done if row.metric is not None),
        metric=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        seconds=_mean(done, lambda row: row.seconds),
        flops=_mean(done, lambda row: row.flops),
        peak_bytes=highest.peak_bytes if highest else None,
        memory=highest.memory if highest else known,
        trainable=next((row.trainable for row in rows if row.trainable is not None), None),
        failures=tuple(row.failure for row in rows if row.failure is not None),
    )


def _mean(rows: list[TrialRow], number: Callable[[TrialRow], float | None]) -> float | None:
    values = [value for row in rows if (value := number(row)) is not None]
    return statistics.fmean(values) if values else None
