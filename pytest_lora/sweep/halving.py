"""Fewer runs: successive halving over the learning rates of each rank, as Optuna's pruner decides it.

Every rate of a rank is trained on a part of the data with one seed; the best go on to a round that is ``factor`` times
as long; the last round is the full training, with all seeds. Rates are halved within their rank, as ranks are what the
sweep is to compare. A training starts afresh in each round, as a schedule of the learning rate does not fit half a run.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def budgets(rates: int, factor: int) -> tuple[float, ...]:
    """Share of the full training in each round, the last of which is 1, for a number of rates of at least 1."""
    if rates < 2:
        return (1.0,)
    rounds = 1
    while factor ** (rounds + 1) <= rates:
        rounds += 1
    return tuple(1 / factor**left for left in range(rounds, -1, -1))


def going_on(metrics: Mapping[float, float], factor: int, maximise: bool) -> tuple[float, ...]:
    """The rates that go on to the next round: the best one in ``factor``, at least one.

    Args:
        metrics: Metric by rate.
        factor: One rate in so many goes on, at least 2.
        maximise: Whether more is better.

    Raises:
        ImportError: Optuna is not installed.
    """
    optuna = require_optuna()
    with _silent(optuna):
        return tuple(rate for rate in metrics if _is_promoted(optuna, rate, metrics, factor, maximise))


def require_optuna() -> Any:
    """Optuna, or an error that says how to install it."""
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ImportError("halving needs Optuna: pip install 'pytest-lora[optuna]'") from error


def _is_promoted(
    optuna: Any, rate: float, metrics: Mapping[float, float], factor: int, maximise: bool
) -> bool:
    """Ask the pruner about one rate after all others have been reported: it judges by what it has seen."""
    study = optuna.create_study(
        direction="maximize" if maximise else "minimize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor),
    )
    pruned = True
    for each in (*(other for other in metrics if other != rate), rate):
        trial = study.ask()
        trial.report(metrics[each], step=1)
        pruned = trial.should_prune()
    return not pruned


@contextmanager
def _silent(optuna: Any) -> Iterator[None]:
    """Without a line for every study that is made."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
