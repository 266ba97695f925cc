"""Runs the trials of a sweep, here or through an executor, and keeps each as it finishes."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.sweep import rate_text
from pytest_lora.sweep.executors import run_all
from pytest_lora.sweep.halving import going_on
from pytest_lora.sweep.journal import Journal
from pytest_lora.sweep.result import SweepResult
from pytest_lora.sweep.rows import TrialRow
from pytest_lora.sweep.settings import SweepSettings, checked
from pytest_lora.sweep.views import number
from pytest_lora.values import require_flag, require_path

if TYPE_CHECKING:
    import os

    from peft import LoraConfig

    from pytest_lora.sweep import TrialPlan
    from pytest_lora.sweep.trial import Evaluate, Job, MakeModel, Train

PACKAGES = ("pytest-lora", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def rank_sweep(
    make_model: MakeModel,
    train: Train,
    evaluate: Evaluate,
    *,
    ranks: Iterable[int] = (4, 8, 16),
    learning_rates: Iterable[float] | None = None,
    halving: int | None = None,
    alpha_ratio: float | None = None,
    alpha: float | None = None,
    fraction: float = 0.1,
    epochs: int = 1,
    seeds: int | Iterable[int] = 1,
    config: LoraConfig | Mapping[str, Any] | None = None,
    metric: str = "metric",
    maximise: bool | None = None,
    data: str = "",
    version: str = "",
    executor: Executor | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> SweepResult:
    """Train a fresh adapter of every rank, at every learning rate, on a slice of the data, and measure.

    Every trial sets its seed, makes a fresh base, sets the seed again, makes a fresh adapter, trains and evaluates it;
    no trial goes on from another's adapter. The metric before training is measured once. A trial that runs out of
    memory, diverges, raises or gives no metric is a row with its diagnosis. Trials that run in this process leave every
    random state as it was.

    Args:
        make_model: Makes a fresh base without adapter: ``make_model()``, a ``torch.nn.Module`` on its device.
        train: ``train(model, plan)`` trains the model, on ``plan.share(data)`` for ``plan.epochs``, and returns its
            losses or None. The plan is a ``TrialPlan``. ``TrainOn(batches, lr=...)`` is a ready-made one.
        evaluate: ``evaluate(model)`` returns the validation metric, a number, or a mapping with an entry ``metric``.
            The model is in evaluation mode.
        ranks: The ranks, different whole numbers of at least 1.
        learning_rates: The rates to train every rank with, as ``plan.learning_rate``; ranks are then compared at the
            best rate of each. None leaves the rate to ``train``, the same for all ranks as a rule, and what is measured
            is then as much a matter of the rate as of the rank.
        halving: Train all rates of a rank briefly, with one seed, and only the best one in so many on: 4 for four rates
            takes half of the grid's steps or less. None trains the whole grid. Needs ``pytest-lora[optuna]``.
        alpha_ratio: ``lora_alpha`` is this times the rank, 2 by default: the scaling is the same for all ranks.
        alpha: ``lora_alpha`` itself, the same for all ranks, so that the scaling falls with the rank.
        fraction: Share of the training data, above 0 and at most 1.
        epochs: Passes over it.
        seeds: How many seeds each rank has (0, 1, ...), or the seeds. Three or more show the noise.
        config: A ``LoraConfig``, or a dict of its fields; its rank and alpha are not used. By default all linear layers
            are adapted.
        metric: Name of the metric, and the entry to take where ``evaluate`` returns a mapping.
        maximise: Whether more of it is better. By default the name says so: less of a loss, an error or a perplexity is
            better, more of anything else.
        data: What the data are, for the record, such as ``"my-set v3, train"``.
        version: Stands for what the journal cannot read of the functions, such as a generator: change it with that.
        executor: Any ``concurrent.futures.Executor``; None runs one trial after another in this process. Threads take
            turns, as seeds are those of the process. A process pool whose worker dies is made anew, and what it lost is
            run again.
        journal: A JSONL file that keeps trials as they finish. A sweep with the same settings goes on from it, also
            with more ranks, rates or seeds. Functions are compared by code and by the values they hold.
        progress: Whether a progress bar is shown; by default where stderr is a terminal.

    Returns:
        The result: ``table()``, ``choose()``, ``plot(path)``, ``log(...)``, ``to_json()``.

    Raises:
        TypeError: An argument has the wrong type, or cannot be sent to the processes of ``executor``.
        ValueError: An argument is out of its range, the journal is of another sweep, or the functions hold what it
            cannot read and there is no ``version``.
        OSError: The journal cannot be written.
    """
    settings = checked(
        make_model,
        train,
        evaluate,
        ranks=ranks,
        learning_rates=learning_rates,
        halving=halving,
        alpha_ratio=alpha_ratio,
        alpha=alpha,
        fraction=fraction,
        epochs=epochs,
        seeds=seeds,
        config=config,
        metric=metric,
        maximise=maximise,
        data=data,
        version=version,
        executor=executor,
    )
    if progress is not None:
        require_flag("progress", progress)
    if journal is not None and require_path("journal", journal).is_dir():
        raise ValueError("journal must be a file, and this is a folder; name a file in it")
    kept = None if journal is None else Journal(journal, settings.described(), settings.unread)
    before, rows = _Run(settings, kept, progress).measure()
    return SweepResult(
        metric=metric,
        maximise=settings.maximise,
        before=before.metric,
        trials=tuple(
            sorted(rows, key=lambda row: (row.rank, row.learning_rate or 0.0, row.seed, row.budget))
        ),
        settings=settings.recorded(),
        versions=versions(),
    )


class _Run:
    """Measures what the journal does not have, round by round."""

    def __init__(self, settings: SweepSettings, kept: Journal | None, progress: bool | None) -> None:
        self.settings, self.kept = settings, kept
        self.disable = None if progress is None else not progress
        self.before = kept.before if kept else None
        self.rows = dict(kept.rows) if kept else {}

    def measure(self) -> tuple[TrialRow, list[TrialRow]]:
        """The row before training, and those of all trials."""
        settings = self.settings
        left = dict.fromkeys(settings.ranks, settings.rates)
        taken: list[TrialRow] = []
        for round_number, budget in enumerate(settings.budgets):
            plans = settings.plans(budget, left)
            self._run(plans, first=not round_number)
            rows = [self.rows[plan.key] for plan in plans]
            taken += rows
            if budget < 1:
                left = {rank: self._going_on([row for row in rows if row.rank == rank]) for rank in left}
        assert self.before is not None
        return self.before, taken

    def _going_on(self, rows: list[TrialRow]) -> tuple[float | None, ...]:
        known = {
            row.learning_rate: row.metric
            for row in rows
            if row.learning_rate is not None and row.metric is not None
        }
        return going_on(known, self.settings.halving or 2, self.settings.maximise)

    def _run(self, plans: list[TrialPlan], first: bool) -> None:
        from pytest_lora.sweep.trial import Job

        settings = self.settings
        make = partial(Job, **settings.functions, config=settings.config, metric=settings.metric)
        jobs = [make(plan=plan) for plan in plans if plan.key not in self.rows]
        if first and self.before is None:
            jobs.insert(0, make(plan=settings.before()))
        total = len(plans) + first
        progress_bar: Any = importlib.import_module("tqdm").tqdm  # it comes with transformers
        with progress_bar(
            total=total, initial=total - len(jobs), desc=_title(plans), disable=self.disable
        ) as bar:
            for job, row in run_all(settings.executor, jobs):
                self._keep(job, row)
                bar.set_postfix_str(_progress_text(job, row, settings.metric))
                bar.update()

    def _keep(self, job: Job, row: TrialRow) -> None:
        if job.plan.epochs:
            self.rows[row.key] = row
        else:
            self.before = row
        if self.kept:
            (self.kept.add if job.plan.epochs else self.kept.add_before)(row)


def _title(plans: list[TrialPlan]) -> str:
    budget = plans[0].budget if plans else 1.0
    return "rank sweep" if budget == 1 else f"rank sweep, {100 * budget:.3g} % of the training"


def _progress_text(job: Job, row: TrialRow, metric: str) -> str:
    rate = "" if row.learning_rate is None else f" at {rate_text(row.learning_rate)}"
    who = f"r={row.rank}{rate} seed {row.seed}" if job.plan.epochs else "before training"
    if row.failure is not None:
        return f"{who}: {row.failure.kind}"
    return f"{who}: {metric} {number(row.metric or 0.0)}"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a sweep depends on."""
    return {"python": platform.python_version(), **dict(_installed())}


def _installed() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
