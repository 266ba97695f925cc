"""A chosen rank with its evidence in one file, which a test can hold a project to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.sweep import Difference
from pytest_lora.files import text_of, write_whole

if TYPE_CHECKING:
    from pytest_lora.sweep.choice import RankChoice
    from pytest_lora.sweep.result import SweepResult

FORMAT = 1

MOST_BYTES = 16 * 2**20
"""Of a lock file; one of 80 layers with a rank for each takes some kilobytes."""


@dataclass(frozen=True, slots=True)
class RankLock:
    """A rank that was chosen, and why.

    Attributes:
        rank: ``r``.
        alpha: ``lora_alpha``.
        learning_rate: The rate that it was best at; None in a sweep over ranks alone.
        reason: Why, in one line.
        verdicts: What each rule said.
        unsettled: What the evidence did not settle.
        data: The slice that the trials were trained on.
        settings: Those of the sweep.
        versions: Those of the sweep.
        evidence: The sweep, without the losses of its trials, as ``SweepResult.to_json`` writes it.
    """

    rank: int
    alpha: float
    learning_rate: float | None
    reason: str
    verdicts: tuple[str, ...]
    unsettled: tuple[str, ...]
    data: str
    settings: dict[str, str]
    versions: dict[str, str]
    evidence: str

    @classmethod
    def of(cls, result: SweepResult, choice: RankChoice | None = None) -> RankLock:
        """The lock of a sweep, not written anywhere.

        Raises:
            ValueError: No trial has a metric.
        """
        choice = result.choose() if choice is None else choice
        chosen = next(row for row in result.rows if row.rank == choice.rank)
        slices = sorted({row.data for row in result.trials if row.data})
        return cls(
            rank=choice.rank,
            alpha=chosen.alpha,
            learning_rate=chosen.learning_rate,
            reason=choice.reason,
            verdicts=tuple(str(verdict) for verdict in choice.verdicts),
            unsettled=choice.unsettled,
            data=", ".join(filter(None, (result.settings.get("data", ""), *slices))),
            settings=result.settings,
            versions=result.versions,
            evidence=replace(
                result, trials=tuple(replace(row, losses=(), findings=()) for row in result.trials)
            ).to_json(),
        )

    def to_json(self) -> str:
        """The lock as one JSON object, a field a line, so that a review sees what changed."""
        own = {"rank_lock": FORMAT, **asdict(self), "evidence": json.loads(self.evidence)}
        return json.dumps(own, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RankLock:
        """The lock that ``to_json`` wrote.

        Raises:
            ValueError: It is no lock, or of a later format.
        """
        try:
            data = json.loads(text)
            found = data.pop("rank_lock")
            data["evidence"] = json.dumps(data["evidence"])
            data["verdicts"], data["unsettled"] = tuple(data["verdicts"]), tuple(data["unsettled"])
            lock = cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"this is no lock of a rank, which result.lock(path) writes: {error!r}"
            ) from error
        if found != FORMAT:
            raise ValueError(
                f"this lock has format {found!r}, and this version of pytest-lora reads {FORMAT}"
            )
        return lock

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RankLock:
        """The lock in a file.

        Raises:
            ValueError: There is no file, or it is no lock; the message has the path.
        """
        try:
            return cls.from_json(text_of(Path(path), MOST_BYTES))
        except OSError as error:
            raise ValueError(
                f"{os.fspath(path)}: it cannot be read ({error.strerror or error}); write it with result.lock(path)"
            ) from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the file, by which a tracker's record names it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __str__(self) -> str:
        rate = "" if self.learning_rate is None else f" at {self.learning_rate:g}"
        return f"r={self.rank}, alpha={self.alpha:g}{rate}: {self.reason}"


def lock(result: SweepResult, path: str | os.PathLike[str], choice: RankChoice) -> RankLock:
    """Write a lock; ``SweepResult.lock`` documents the arguments."""
    made = RankLock.of(result, choice)
    write_whole(Path(path), made.to_json())
    return made


def in_use(lock: RankLock, config: Any, learning_rate: float | None) -> Iterator[Difference]:
    """Where what is trained with differs from what was locked."""
    if config is not None:
        for name, locked, now in (("r", lock.rank, config.r), ("lora_alpha", lock.alpha, config.lora_alpha)):
            if locked != now:
                yield Difference(name, f"{locked:g}", f"{now:g}")
    if learning_rate is not None and lock.learning_rate not in (None, learning_rate):
        yield Difference("learning_rate", f"{lock.learning_rate:g}", f"{learning_rate:g}")


def drift(lock: RankLock, fresh: SweepResult | None) -> Iterator[Difference]:
    """Where a fresh sweep, or what is installed, is not what the evidence is from."""
    if fresh is not None:
        settings = (lock.settings, fresh.settings)
        for name in sorted({*settings[0], *settings[1]}):
            locked, now = (one.get(name, "nothing") for one in settings)
            if locked != now:
                yield Difference(name, locked, now)
    for package, locked in sorted(lock.versions.items()):
        now = _installed(package)
        if now and _release(now) != _release(locked):
            yield Difference(package, locked, now)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # Python, or a package that this machine does without
        return ""


def _release(number: str) -> list[str]:
    """Major and minor number: a patch is no reason to sweep again."""
    return number.split(".")[:2]
