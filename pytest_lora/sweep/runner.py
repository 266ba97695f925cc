"""Runs the trials of a sweep, here or through an executor, and keeps each as it finishes."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pytest_lora.sweep.executors import run_all
from pytest_lora.sweep.journal import Journal
from pytest_lora.sweep.result import SweepResult
from pytest_lora.sweep.rows import TrialRow
from pytest_lora.sweep.settings import SweepSettings, checked
from pytest_lora.sweep.table import number

if TYPE_CHECKING:
    import os

    from peft import LoraConfig

    from pytest_lora.sweep.trial import Evaluate, Job, MakeModel, Train

PACKAGES = ("pytest-lora", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def rank_sweep(
    make_model: MakeModel,
    train: Train,
    evaluate: Evaluate,
    *,
    ranks: Iterable[int] = (4, 8, 16),
    alpha_ratio: float = 2.0,
    fraction: float = 0.1,
    epochs: int = 1,
    seeds: int | Iterable[int] = 1,
    config: LoraConfig | Mapping[str, Any] | None = None,
    metric: str = "metric",
    maximise: bool = True,
    data: str = "",
    executor: Executor | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> SweepResult:
    """Train a fresh adapter of every rank on a slice of the data, and measure.

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
        alpha_ratio: ``lora_alpha`` is this times the rank.
        fraction: Share of the training data, above 0 and at most 1.
        epochs: Passes over it.
        seeds: How many seeds each rank has (0, 1, ...), or the seeds. Three or more show the noise.
        config: A ``LoraConfig``, or a dict of its fields; its rank and alpha are not used. By default all linear layers
            are adapted.
        metric: Name of the metric, and the entry to take where ``evaluate`` returns a mapping.
        maximise: Whether more of it is better; False for a loss.
        data: What the data are, for the record, such as ``"my-set v3, train"``.
        executor: Any ``concurrent.futures.Executor``; None runs one trial after another in this process. Threads take
            turns, as seeds are those of the process. A process pool whose worker dies is made anew, and what it lost is
            run again.
        journal: A JSONL file that keeps trials as they finish. A sweep with the same settings goes on from it, also
            with more ranks or seeds.
        progress: Whether a progress bar is shown; by default where stderr is a terminal.

    Returns:
        The result: ``table()``, ``choose()``, ``plot(path)``, ``log(...)``, ``to_json()``.

    Raises:
        TypeError: An argument has the wrong type, or cannot be sent to the processes of ``executor``.
        ValueError: An argument is out of its range, or the journal is of another sweep.
    """
    settings = checked(
        make_model,
        train,
        evaluate,
        ranks=ranks,
        alpha_ratio=alpha_ratio,
        fraction=fraction,
        epochs=epochs,
        seeds=seeds,
        config=config,
        metric=metric,
        maximise=maximise,
        data=data,
        executor=executor,
    )
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress must be True, False or None, not {progress!r}")
    kept = None if journal is None else Journal(journal, settings.described())
    before, rows = _measure(settings, kept, progress)
    return SweepResult(
        metric=metric,
        maximise=maximise,
        before=before.metric,
        trials=tuple(sorted(rows, key=lambda row: (row.rank, row.seed))),
        settings=settings.described(),
        versions=versions(),
    )


def _measure(
    settings: SweepSettings, kept: Journal | None, progress: bool | None
) -> tuple[TrialRow, list[TrialRow]]:
    """The row before training, and those of all trials, from the journal as far as it has them."""
    from pytest_lora.sweep.trial import Job

    known = kept.rows if kept else {}
    before = kept.before if kept else None
    plans = settings.plans()
    rows = [known[plan.rank, plan.seed] for plan in plans if (plan.rank, plan.seed) in known]
    make = partial(Job, **settings.functions, config=settings.config, metric=settings.metric)
    jobs = [make(plan=plan) for plan in plans if (plan.rank, plan.seed) not in known]
    if before is None:
        jobs.insert(0, make(plan=settings.plan(settings.ranks[0], settings.seeds[0], epochs=0)))
    disable = None if progress is None else not progress
    progress_bar: Any = importlib.import_module("tqdm").tqdm  # it comes with transformers
    with progress_bar(
        total=len(plans) + 1, initial=len(plans) + 1 - len(jobs), desc="rank sweep", disable=disable
    ) as bar:
        for job, row in run_all(settings.executor, jobs):
            if job.plan.epochs == 0:
                before = row
                _keep(kept.add_before if kept else None, row)
            else:
                rows.append(row)
                _keep(kept.add if kept else None, row)
            bar.set_postfix_str(_progress_text(job, row, settings.metric))
            bar.update()
    assert before is not None
    return before, rows


def _keep(add: Callable[[TrialRow], None] | None, row: TrialRow) -> None:
    if add is not None:
        add(row)


def _progress_text(job: Job, row: TrialRow, metric: str) -> str:
    who = f"r={row.rank} seed {row.seed}" if job.plan.epochs else "before training"
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
