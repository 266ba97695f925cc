"""What a sweep has measured: a row a trial, and a row a rank. Plain data, no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

from pytest_lora.findings import SEVERITIES, Finding
from pytest_lora.values import require_one_of, require_real, require_text, require_whole

TrialKey = tuple[int, float | None, int, float]
"""Rank, learning rate, seed, share of the full training."""

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
        learning_rate: The rate of the trial's plan; None in a sweep over ranks alone.
        scaling: What the adapter's product is multiplied with; None where it differs between layers.
        budget: Share of the full training: below 1 in the early rounds of a sweep that halves.
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
    learning_rate: float | None = None
    scaling: float | None = None
    budget: float = 1.0

    @property
    def key(self) -> TrialKey:
        """Which trial of a sweep this is."""
        return self.rank, self.learning_rate, self.seed, self.budget

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON, in which numbers that are not finite are words."""
        data = asdict(self)
        data["losses"] = [loss if math.isfinite(loss) else str(loss) for loss in self.losses]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrialRow:
        """The row that ``to_dict`` gave.

        Raises:
            TypeError, ValueError: It is none; the message has the field.
        """
        for name, value in data.items():
            if name in _TAKEN and not (value is None and name in _MAY_LACK):
                _TAKEN[name](name, value)
        failure = data.get("failure")
        for finding in data.get("findings", ()):
            require_one_of("severity", finding["severity"], SEVERITIES)
        if failure:
            require_one_of("kind", failure["kind"], FAILURE_KINDS)
        return cls(
            **data
            | {
                "losses": tuple(float(loss) for loss in data.get("losses", ())),
                "findings": tuple(Finding(**finding) for finding in data.get("findings", ())),
                "failure": Failure(**failure) if failure else None,
            }
        )


_MAY_LACK = ("metric", "seconds", "flops", "peak_bytes", "trainable", "learning_rate", "scaling")
_TAKEN: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(("rank", "seed", "flops", "peak_bytes", "trainable"), partial(require_whole, most=2**80)),
    **dict.fromkeys(("alpha", "metric", "seconds", "learning_rate", "scaling", "budget"), require_real),
    **dict.fromkeys(("memory", "data", "device"), require_text),
}


@dataclass(frozen=True, slots=True)
class RateOutcome:
    """All trials of one rank at one learning rate, of the longest training they came to.

    Attributes:
        learning_rate: The rate.
        metrics: Metric by seed, of the trials that have one, in order of the seeds.
        budget: Share of the full training that they had; below 1 where halving dropped the rate.
        failures: What went wrong in the other trials.
        steps: Losses of the longest of them; 0 where ``train`` returned none.
    """

    learning_rate: float
    metrics: tuple[tuple[int, float], ...]
    budget: float
    failures: tuple[Failure, ...]
    steps: int = 0

    @property
    def metric(self) -> float | None:
        """The mean over the seeds; None where every trial failed."""
        return statistics.fmean(value for _, value in self.metrics) if self.metrics else None

    @property
    def spread(self) -> float | None:
        """The standard deviation (with n - 1), None for fewer than two seeds."""
        return statistics.stdev(value for _, value in self.metrics) if len(self.metrics) > 1 else None


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """All trials of one rank, at its best learning rate; means are over the trials that have a metric.

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
        learning_rate: The best rate: the one with the fewest failed trials, and among these with the best metric; None
            in a sweep over ranks alone.
        scaling: What the adapter's product is multiplied with.
        rates: Every rate that was tried, in ascending order.
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
    learning_rate: float | None = None
    scaling: float | None = None
    rates: tuple[RateOutcome, ...] = ()

    @property
    def step(self) -> float | None:
        """The effective step: rate times scaling, which is what an update of the factors moves the weights by."""
        if self.learning_rate is None or self.scaling is None:
            return None
        return self.learning_rate * self.scaling


def outcomes(rows: Iterable[TrialRow], maximise: bool = True) -> tuple[RankOutcome, ...]:
    """One outcome a rank, at its best rate, the smallest rank first."""
    by_rank: dict[int, list[TrialRow]] = {}
    for row in rows:
        by_rank.setdefault(row.rank, []).append(row)
    return tuple(_outcome(by_rank[rank], maximise) for rank in sorted(by_rank))


def _outcome(rows: list[TrialRow], maximise: bool) -> RankOutcome:
    tried: dict[float | None, list[TrialRow]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        tried.setdefault(row.learning_rate, []).append(row)
    longest = {rate: _longest(own) for rate, own in tried.items()}
    full = {rate: own for rate, own in longest.items() if own[0].budget == 1} or longest
    measured = {rate: own for rate, own in full.items() if any(row.metric is not None for row in own)}
    if not measured or max(own[0].budget for own in longest.values()) < 1:
        return _of_one_rate(rows[0], [], rows, longest)
    best = max(measured, key=lambda rate: _merit(measured[rate], maximise))
    done = [row for row in measured[best] if row.metric is not None]
    return _of_one_rate(done[0], done, measured[best], longest)


def _longest(rows: list[TrialRow]) -> list[TrialRow]:
    most = max(row.budget for row in rows)
    return [row for row in rows if row.budget == most]


def _merit(rows: list[TrialRow], maximise: bool) -> tuple[int, float]:
    values = [row.metric for row in rows if row.metric is not None]
    return len(values) - len(rows), statistics.fmean(values) * (1 if maximise else -1)


def _of_one_rate(
    one: TrialRow, done: list[TrialRow], rows: list[TrialRow], tried: dict[float | None, list[TrialRow]]
) -> RankOutcome:
    metrics = _metrics(done)
    values = [value for _, value in metrics]
    peaks = [row for row in done if row.peak_bytes is not None]
    highest = max(peaks, key=lambda row: row.peak_bytes or 0, default=None)
    known = next((row.memory for row in done), "")
    return RankOutcome(
        rank=one.rank,
        alpha=one.alpha,
        metrics=metrics,
        metric=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        seconds=_mean(done, lambda row: row.seconds),
        flops=_mean(done, lambda row: row.flops),
        peak_bytes=highest.peak_bytes if highest else None,
        memory=highest.memory if highest else known,
        trainable=next((row.trainable for row in rows if row.trainable is not None), None),
        failures=tuple(row.failure for row in rows if row.failure is not None),
        learning_rate=one.learning_rate if done else None,
        scaling=one.scaling,
        rates=tuple(
            RateOutcome(
                rate,
                _metrics(own),
                own[0].budget,
                tuple(row.failure for row in own if row.failure),
                max(len(row.losses) for row in own),
            )
            for rate, own in sorted(tried.items(), key=lambda item: item[0] or 0.0)
            if rate is not None
        ),
    )


def _metrics(rows: list[TrialRow]) -> tuple[tuple[int, float], ...]:
    return tuple((row.seed, row.metric) for row in rows if row.metric is not None)


def _mean(rows: list[TrialRow], number: Callable[[TrialRow], float | None]) -> float | None:
    values = [value for row in rows if (value := number(row)) is not None]
    return statistics.fmean(values) if values else None
