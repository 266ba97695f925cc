"""The choice and its evidence in an experiment tracker, through the trackers of accelerate."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pytest_lora.sweep.choice import RankChoice
from pytest_lora.sweep.lock import RankLock
from pytest_lora.values import shown

if TYPE_CHECKING:
    from pytest_lora.sweep.result import SweepResult

LONGEST = 500
"""Characters of a value: what MLflow takes as a parameter in all its versions."""


def log(
    result: SweepResult,
    trackers: Sequence[Any],
    project: str,
    folder: str,
    choice: RankChoice,
    lock: str = "",
) -> None:
    """Write to each tracker; ``SweepResult.log`` documents the arguments."""
    if not trackers:
        raise ValueError("trackers must name at least one, such as 'tensorboard'")
    require_known(trackers)
    with opened(trackers, project, folder) as found:
        for tracker in found:
            _write(tracker, result, choice, lock)


def _require_known(tracking: Any, tracker: Any) -> None:
    if isinstance(tracker, tracking.GeneralTracker):
        return
    if not isinstance(tracker, str):
        raise TypeError(
            f"trackers must be names or trackers of accelerate, not {type(tracker).__name__} {shown(tracker)}"
        )
    known = tracking.LOGGER_TYPE_TO_CLASS
    if tracker not in known:
        raise ValueError(
            f"trackers: there is no tracker {shown(tracker)}; accelerate has {', '.join(sorted(known))}"
        )
    if tracker not in [getattr(kind, "value", kind) for kind in tracking.get_available_trackers()]:
        raise ValueError(f"the package of the tracker {tracker!r} is not installed")


def _opened(tracking: Any, name: str, project: str, folder: str) -> Any:
    made = tracking.LOGGER_TYPE_TO_CLASS[name]
    tracker = made(project, folder) if made.requires_logging_directory else made(project)
    # Trackers of older versions of accelerate start when they are made.
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def _write(tracker: Any, result: SweepResult, choice: RankChoice, lock: str) -> None:
    tracker.store_init_configuration(provenance(result, choice, lock))
    for rank, values in measurements(result):
        tracker.log(values, step=rank)


def provenance(result: SweepResult, choice: RankChoice, lock: str = "") -> dict[str, str | int | float]:
    """Where the rank comes from, as flat values: the choice, its verdicts, settings, seeds, versions, its lock."""
    chosen = next(row for row in result.rows if row.rank == choice.rank)
    values: dict[str, str | int | float] = {
        "rank": choice.rank,
        "alpha": chosen.alpha,
        "learning_rate": chosen.learning_rate or 0.0,
        "rank_reason": choice.reason,
        "rank_caveats": "; ".join(choice.caveats),
        "rank_runner_up": choice.runner_up or 0,
        "rank_unsettled": "; ".join(choice.unsettled),
        "sweep_ranks": ", ".join(str(row.rank) for row in result.rows),
        "sweep_seeds": ", ".join(map(str, sorted({row.seed for row in result.trials}))),
        "sweep_slice": ", ".join(sorted({row.data for row in result.trials if row.data})),
        "sweep_failed_trials": len(result.failed),
    }
    values |= {f"rank_rule_{verdict.rule}": str(verdict) for verdict in choice.verdicts}
    values |= {f"sweep_{name}": text for name, text in result.settings.items()}
    values |= {f"version_{name}": text for name, text in result.versions.items()}
    if lock:
        values |= {"rank_lock": lock, "rank_lock_sha256": RankLock.read(lock).digest}
    if result.before is not None:
        values["metric_before"] = result.before
    return {name: v[:LONGEST] if isinstance(v, str) else v for name, v in values.items()}


def measurements(result: SweepResult) -> Iterator[tuple[int, dict[str, float]]]:
    """Rank and what was measured of it, without what is not known."""
    shares = result.shares()
    for row in result.rows:
        values = {
            f"rank_sweep/{result.metric}": row.metric,
            "rank_sweep/learning_rate": row.learning_rate,
            "rank_sweep/spread": row.spread,
            "rank_sweep/share_of_best": shares.get(row.rank),
            "rank_sweep/seconds": row.seconds,
            "rank_sweep/flops": row.flops,
            "rank_sweep/peak_bytes": row.peak_bytes,
            "rank_sweep/trainable": row.trainable,
        }
        yield row.rank, {name: float(value) for name, value in values.items() if value is not None}


@contextmanager
def _state_of_accelerate() -> Iterator[None]:
    """What accelerate's trackers log through, taken down again unless the user has set it up before."""
    state: Any = importlib.import_module("accelerate.state").PartialState
    was_there = bool(state._shared_state)
    state()
    try:
        yield
    finally:
        if not was_there:
            state._reset_state()


def require_known(trackers: Sequence[Any]) -> None:
    """Refuse what is neither the name of a tracker whose package is installed nor a tracker of accelerate.

    Raises:
        TypeError: It is neither a name nor a tracker.
        ValueError: There is no such name, or its package is not installed.
    """
    tracking: Any = importlib.import_module("accelerate.tracking") if trackers else None
    for tracker in trackers:
        _require_known(tracking, tracker)


@contextmanager
def opened(trackers: Sequence[Any], project: str, folder: str) -> Iterator[list[Any]]:
    """Open the trackers that are named, and finish these at the end; those that are open stay so."""
    tracking: Any = importlib.import_module("accelerate.tracking")
    with _state_of_accelerate(), ExitStack() as stack:
        found: list[Any] = []
        for tracker in trackers:
            if isinstance(tracker, str):
                tracker = _opened(tracking, tracker, project, folder)
                stack.callback(tracker.finish)
            found.append(tracker)
        yield found
