"""One trial: seed, fresh base, fresh adapter, training, metric. What goes wrong becomes a row with its diagnosis."""

from __future__ import annotations

import copy
import gc
import getpass
import importlib
import math
import multiprocessing
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from pytest_lora.findings import Finding
from pytest_lora.inspection.base import base_facts, base_parameters
from pytest_lora.inspection.peft_internals import LoraLayer
from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.survey import survey
from pytest_lora.sweep import TrialPlan
from pytest_lora.sweep.measure import Cost, cost_of_training, first_line, peak_memory
from pytest_lora.sweep.rows import Failure, TrialRow

_held: list[FileLock] = []
"""The lock on this process's GPU; the system lets it go when the process ends, however it ends."""

LARGE = 2**26
"""Bytes of a model on the CPU from which on its memory is wanted back before the next trial."""

MakeModel = Callable[[], nn.Module]
Train = Callable[[nn.Module, TrialPlan], Iterable[float] | None]
Evaluate = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Job:
    """All that a worker needs for a trial; with ``plan.epochs`` 0 nothing is trained, which measures the base."""

    make_model: MakeModel
    train: Train
    evaluate: Evaluate
    config: Any
    plan: TrialPlan
    metric: str


class NoMetricError(Exception):
    """``evaluate`` gave no number."""


class DivergedError(Exception):
    """A loss or the metric is not finite."""


def run_trial(job: Job) -> TrialRow:
    """Run one trial; every random state and setting of the process is afterwards what it was.

    Whatever fails is in the row. Only what is no ``Exception``, such as ``KeyboardInterrupt``, is raised.
    """
    with Keeper(), quiet_libraries():
        claim_gpu()
        row = job.plan.row()
        trial = _Trial(job, row)
        try:
            trial.run()
        except Exception as error:
            trial.row = replace(trial.row, metric=None, failure=diagnosis(error))
            # Frames of a failed step hold its activations, which the next trial needs the memory of.
            traceback.clear_frames(error.__traceback__)
        row, is_large = trial.row, trial.is_large
        del trial
    # Models of PEFT are cycles. A collection takes up to a second, which small models are not worth.
    if is_large:
        gc.collect()
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        cuda.empty_cache()
    return row


class _Trial:
    """The steps of a trial, and the row as far as it has come."""

    def __init__(self, job: Job, row: TrialRow) -> None:
        self.job, self.row, self.is_large = job, row, False

    def run(self) -> None:
        job, plan = self.job, self.job.plan
        seed_everything(plan.seed)
        base = job.make_model()
        if not isinstance(base, nn.Module):
            raise TypeError(f"make_model must return a torch.nn.Module, not {type(base).__name__}")
        model = fresh_adapter(base, job.config, plan)
        device = next(model.parameters()).device
        self.is_large = device.type != "cpu" or sum(p.nbytes for p in model.parameters()) > LARGE
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.row = replace(
            self.row,
            trainable=sum(p.numel() for p in trainable),
            device=str(device),
            scaling=_scaling(model),
        )
        if plan.epochs:
            self._train(model)
        model.eval()
        metric = metric_of(job.evaluate(model), job.metric)
        if not math.isfinite(metric):
            raise DivergedError(f"{job.metric} is {metric} after training")
        self.row = replace(self.row, metric=metric)

    def _train(self, model: nn.Module) -> None:
        model.train()
        cost = Cost()
        try:
            with cost_of_training(model) as cost:
                losses = _losses(self.job.train(model, self.job.plan))
        finally:
            peak, memory = peak_memory(model, cost)
            drawn = " + ".join(self.job.plan.drawn)
            self.row = replace(
                self.row, seconds=cost.seconds, flops=cost.flops, peak_bytes=peak, memory=memory, data=drawn
            )
        self.row = replace(self.row, losses=losses, findings=_health(model, losses))
        for step, loss in enumerate(losses, 1):
            if not math.isfinite(loss):
                raise DivergedError(f"loss {step} of {len(losses)} is {loss}")


def fresh_adapter(base: nn.Module, config: Any, plan: TrialPlan) -> nn.Module:
    """A fresh adapter of the plan's rank on a base, its weights drawn from the plan's seed alone.

    Args:
        base: A base without adapter.
        config: A ``LoraConfig``, or a mapping of its fields; rank and alpha come from the plan. Without
            ``target_modules`` all linear layers are adapted, without ``task_type`` it is that of the base.
        plan: The trial.

    Raises:
        ValueError: The base carries an adapter, or PEFT refuses the configuration.
    """
    import peft

    lora_config: Any = peft.LoraConfig
    get_peft_model: Any = peft.get_peft_model
    found = survey(base)
    if found.carries_adapter:
        raise ValueError(
            "make_model must return a fresh base in every call, without adapter; "
            f"this {type(base).__name__} carries one already"
        )
    if isinstance(config, lora_config):
        made = copy.deepcopy(config)
        made.r, made.lora_alpha = plan.rank, plan.alpha
    else:
        facts = base_facts(found, base_parameters(found))
        fields: dict[str, Any] = {"task_type": facts.task_type, **(config or {})}
        fields.setdefault("target_modules", _all_linear(base))
        made = lora_config(r=plan.rank, lora_alpha=plan.alpha, **fields)
    seed_everything(plan.seed)
    model: nn.Module = get_peft_model(base, made)
    return model


def _scaling(model: nn.Module) -> float | None:
    """What PEFT multiplies the adapter's product with; None where layers differ."""
    found = {s for layer in model.modules() if isinstance(layer, LoraLayer) for s in layer.scaling.values()}
    return float(found.pop()) if len(found) == 1 else None


def _all_linear(base: nn.Module) -> Any:
    from transformers import PreTrainedModel

    if isinstance(base, PreTrainedModel):
        return "all-linear"
    return [name for name, module in base.named_modules() if name and isinstance(module, nn.Linear)]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy where it is loaded, and torch on every device."""
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def metric_of(given: Any, name: str) -> float:
    """The number in what ``evaluate`` returned: itself, or the entry of a mapping.

    Raises:
        NoMetricError: There is none; says what there is.
    """
    value = given
    if isinstance(given, Mapping):
        if name not in given:
            known = ", ".join(map(repr, given)) or "nothing"
            raise NoMetricError(f"evaluate returned a mapping without {name!r}, with {known}")
        value = given[name]
    try:
        if value is None or isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NoMetricError(f"evaluate returned {type(value).__name__} {value!r:.60}, no number") from error


def _losses(given: Any) -> tuple[float, ...]:
    if given is None:
        return ()
    try:
        return tuple(float(loss) for loss in given)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"train must return its losses, a list of numbers, or None; not {type(given).__name__} {given!r:.60}"
        ) from error


def _health(model: nn.Module, losses: tuple[float, ...]) -> tuple[Finding, ...]:
    from pytest_lora.checks.model import check_model
    from pytest_lora.checks.training import diagnose_history
    from pytest_lora.expect import Expect

    found = list(check_model(model, expect=Expect(fresh=False)).findings)
    if losses:
        found += diagnose_history(losses).findings
    return tuple(found)


def diagnosis(error: BaseException) -> Failure:
    """What an exception of a trial means, and what to change."""
    said = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, NoMetricError):
        return Failure("no metric", first_line(error), "return a number, or name the entry with metric=")
    if isinstance(error, DivergedError):
        return Failure("diverged", first_line(error), "lower the learning rate, or warm it up")
    if out_of_memory(error):
        return Failure("out of memory", said, "lower the batch size: rank hardly changes the peak")
    return Failure(
        "error", f"{said}{_place(error)}", "mend it and run again: the journal keeps the other trials"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of the machine."""
    memory: Any = importlib.import_module("accelerate.utils.memory")

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and bool(memory.should_reduce_batch_size(error))


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""


def claim_gpu() -> None:
    """In a worker process that sees several GPUs, make one current that no other worker has; do nothing elsewhere.

    Where there are more workers than GPUs, the rest share them. A worker that sees one GPU, as under dask-cuda or
    Slurm's ``--gpus-per-task=1``, has been given its own already.
    """
    if _held or multiprocessing.parent_process() is None or torch.cuda.device_count() < 2:
        return
    count = torch.cuda.device_count()
    for index in range(count):
        lock = FileLock(_folder() / f"{torch.cuda.get_device_properties(index).uuid}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        torch.cuda.set_device(index)
        return
    torch.cuda.set_device(os.getpid() % count)


def _folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir(), f"pytest-lora-sweep-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
