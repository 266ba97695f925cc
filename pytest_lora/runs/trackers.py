"""Findings of a run in experiment trackers, as they come, through the trackers of accelerate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pytest_lora.findings import LoraHealthWarning
from pytest_lora.sweep import trackers as through_accelerate
from pytest_lora.values import require_items

if TYPE_CHECKING:
    from pytest_lora.findings import Report

PROJECT = "lora-health"
"""Project, or experiment, of the trackers that are opened by their names."""


class TrackedFindings:
    """What takes the reports of a run to its trackers. Those named are opened with the first finding, and closed.

    A tracker that raises is named once, in a ``LoraHealthWarning``, and left alone from then on: no network takes a
    training with it.

    Args:
        trackers: Names (``"wandb"``, ``"mlflow"``, ``"trackio"``, ``"tensorboard"``, ...) or trackers of accelerate
            that are open, which stay so.
        project: Project, or experiment, of those that are named.
        folder: Where trackers that write files write them.

    Raises:
        TypeError: A tracker is neither a name nor a tracker of accelerate.
        ValueError: accelerate has no tracker of such a name, or its package is not installed.
    """

    def __init__(self, trackers: Iterable[Any] = (), project: str = PROJECT, folder: str = ".") -> None:
        self._given = (
            [trackers]
            if isinstance(trackers, str)
            else list(require_items("trackers", trackers, "names or trackers of accelerate"))
        )
        through_accelerate.require_known(self._given)
        self._project, self._folder = project, folder
        self._stack = ExitStack()
        self._open: list[Any] | None = None
        self._counts = {"error": 0, "warning": 0, "info": 0}

    def __call__(self, report: Report, step: int) -> None:
        """Take a report with new findings to each tracker.

        Args:
            report: The findings.
            step: Optimizer steps that were taken before.
        """
        if not self._given:
            return
        if self._open is None:
            try:
                self._open = self._stack.enter_context(
                    through_accelerate.opened(self._given, self._project, self._folder)
                )
            except Exception as error:
                self._open = []
                self._give_up("a tracker", error)
        for finding in report.findings:
            self._counts[finding.severity] += 1
        numbers = {f"lora/{severity}s": float(number) for severity, number in self._counts.items()}
        numbers |= {f"lora/{finding.code}": 1.0 for finding in report.findings}
        texts = {finding.code: str(finding)[: through_accelerate.LONGEST] for finding in report.findings}
        for tracker in list(self._open):
            try:
                tracker.log(numbers, step=step)
                _write_texts(tracker, texts, step)
            except Exception as error:
                self._open.remove(tracker)
                self._give_up(f"the tracker {tracker.name!r}", error)

    def close(self) -> None:
        """Close the trackers that were opened here; the next report opens them anew."""
        self._open = None
        try:
            self._stack.close()
        except Exception as error:
            self._give_up("a tracker", error)

    def _give_up(self, which: str, error: Exception) -> None:
        warnings.warn(f"{which} takes no findings: {error}", LoraHealthWarning, stacklevel=3)


TEXTS_BY_STEP = ("tensorboard", "trackio")
"""Trackers that show texts by step. Trackio sends its settings with the first numbers, and later ones never."""


def _write_texts(tracker: Any, texts: dict[str, str], step: int) -> None:
    """Write what was found in words: by step where the tracker shows it so, else with the settings of the run."""
    if tracker.name in TEXTS_BY_STEP:
        tracker.log({f"lora/{code}/text": text for code, text in texts.items()}, step=step)
    else:
        tracker.store_init_configuration({f"lora_{code}": text for code, text in texts.items()})
