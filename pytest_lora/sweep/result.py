"""The result of a sweep: what was measured, and what can be asked of it. No torch, so that it can be read anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_lora.sweep.choice import METRIC_SHARE, MIN_GAIN, TIME_SHARE, RankChoice, choose
from pytest_lora.sweep.rows import RankOutcome, TrialRow, outcomes
from pytest_lora.sweep.verdicts import metric_shares
from pytest_lora.sweep.views import markdown_table, text_table
from pytest_lora.values import in_short, require_one_of

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from pytest_lora.memory.price import Price
    from pytest_lora.sweep.lock import RankLock
    from pytest_lora.sweep.prices import SweepPrices


@dataclass(frozen=True, slots=True)
class SweepResult:
    """All trials of a sweep.

    Attributes:
        metric: Name of the metric.
        maximise: Whether more of it is better.
        before: The metric before training; None where it could not be measured.
        trials: One row a trial, by rank and seed.
        settings: What all trials share, as readable text: ``fraction``, ``epochs``, ``config``, ``data`` and so on.
        versions: Versions of Python and of the packages that matter.
    """

    metric: str
    maximise: bool
    before: float | None
    trials: tuple[TrialRow, ...]
    settings: dict[str, str]
    versions: dict[str, str]

    @property
    def rows(self) -> tuple[RankOutcome, ...]:
        """One row a rank, at its best learning rate, the smallest first; means over seeds."""
        return outcomes(self.trials, self.maximise)

    @property
    def failed(self) -> tuple[TrialRow, ...]:
        """The trials without a metric, each with its diagnosis."""
        return tuple(row for row in self.trials if row.failure is not None)

    def shares(self) -> dict[int, float]:
        """Share of the best metric by rank, as the metric rule counts it; empty where that means nothing."""
        measured = [row for row in self.rows if row.metric is not None]
        return metric_shares(measured, self.before, self.maximise)

    def choose(
        self,
        metric_share: float = METRIC_SHARE,
        time_share: float = TIME_SHARE,
        min_gain: float = MIN_GAIN,
    ) -> RankChoice:
        """Choose a rank; ``pytest_lora.sweep.choice`` has the rules and their formulas.

        Args:
            metric_share: Share of the best metric that is enough.
            time_share: Share of the largest rank's training time; shown, but never decides.
            min_gain: Gain of a doubling that pays, as a share of the metric's size.

        Returns:
            The rank, every rule's verdict, the runner-up, and what the evidence does not settle.

        Raises:
            TypeError: A threshold is no number.
            ValueError: A threshold is out of its range, or no trial has a metric.
        """
        return choose(
            self.rows,
            before=self.before,
            maximise=self.maximise,
            metric_share=metric_share,
            time_share=time_share,
            min_gain=min_gain,
            metric=self.metric,
        )

    def table(self, style: Literal["text", "markdown"] = "text") -> str:
        """One line a rank: metric and spread, share of the best, time, operations, memory, parameters; then failures.

        Raises:
            ValueError: ``style`` is neither.
        """
        require_one_of("style", style, ("text", "markdown"))
        return (text_table if style == "text" else markdown_table)(self)

    def __str__(self) -> str:
        return self.table()

    def plot(
        self,
        path: str | os.PathLike[str],
        *,
        theme: Literal["light", "dark"] = "light",
        choice: RankChoice | None = None,
    ) -> Path:
        """Draw the sweep; the ending of ``path`` says how, such as ``.png`` or ``.svg``. Needs ``pytest-lora[plot]``.

        Args:
            path: The file to write.
            theme: ``"light"`` or ``"dark"``.
            choice: The choice to mark; that of ``choose()`` by default.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: The theme is neither, the ending is unknown, or no trial has a metric.
        """
        from pytest_lora.sweep.views import draw

        return draw(self, path, theme, self.choose() if choice is None else choice)

    def log(
        self,
        *trackers: Any,
        project: str = "rank-sweep",
        folder: str = ".",
        choice: RankChoice | None = None,
        lock: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write choice and evidence to experiment trackers, through accelerate.

        Args:
            trackers: Names (``"tensorboard"``, ``"wandb"``, ``"mlflow"``, ``"trackio"``, ...), or trackers that are
                open already, such as ``accelerator.get_tracker("wandb")``, which stay open.
            project: Name of the project or run, for trackers given by name.
            folder: Where trackers that write files put them.
            choice: The choice to write; that of ``choose()`` by default.
            lock: The file of the lock that the choice went into, to which the record then points, with its SHA-256.

        Raises:
            TypeError: A tracker is neither a name nor a tracker.
            ValueError: There is no tracker of that name, its package is not installed, no trial has a metric, or
                ``lock`` is no lock.
        """
        from pytest_lora.sweep.trackers import log

        locked = "" if lock is None else str(lock)
        log(self, trackers, project, folder, self.choose() if choice is None else choice, locked)

    def prices(
        self,
        price: Price | None = None,
        *,
        metric_share: float = METRIC_SHARE,
        time_share: float = TIME_SHARE,
    ) -> SweepPrices:
        """What each rank's training cost, and the time rule on measured time and on operations, side by side.

        Args:
            price: ``price(card=..., utilisation=..., per_hour=...)``, for hours and money of the operations.
            metric_share: Share of the best metric that is enough.
            time_share: Share of the largest rank's time, or operations, that a rank is to stay under.

        Raises:
            TypeError: ``price`` is none, or a share is no number.
            ValueError: A share is out of its range.
        """
        from pytest_lora.sweep.prices import sweep_prices

        return sweep_prices(self, price, metric_share=metric_share, time_share=time_share)

    def lock(self, path: str | os.PathLike[str], *, choice: RankChoice | None = None) -> RankLock:
        """Write the chosen rank with its evidence to a file, for ``assert_rank_suffices`` in CI.

        Args:
            path: The file, such as ``"rank.json"``; whole or as it was before.
            choice: The choice to lock; that of ``choose()`` by default.

        Raises:
            ValueError: No trial has a metric.
            OSError: The file cannot be written.
        """
        from pytest_lora.sweep.lock import lock

        return lock(self, path, self.choose() if choice is None else choice)

    def to_json(self) -> str:
        """The result as one JSON object."""
        return json.dumps(
            {
                "metric": self.metric,
                "maximise": self.maximise,
                "before": self.before,
                "trials": [row.to_dict() for row in self.trials],
                "settings": self.settings,
                "versions": self.versions,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> SweepResult:
        """The result that ``to_json`` wrote.

        Raises:
            ValueError: ``text`` is something else.
        """
        try:
            data = json.loads(text)
            trials = tuple(TrialRow.from_dict(row) for row in data.pop("trials"))
            return cls(trials=trials, **data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"text is no result of a sweep: {in_short(error)}") from error
