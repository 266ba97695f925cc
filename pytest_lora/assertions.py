"""Assertions: the checks, raising. Errors fail, warnings warn, infos stay in the report."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_lora.findings import LoraHealthWarning, Report

if TYPE_CHECKING:
    import os

    import torch
    from peft import LoraConfig
    from torch import nn
    from torch.optim import Optimizer
    from transformers import PretrainedConfig

    from pytest_lora.expect import Expect
    from pytest_lora.facts.training import LossDrop
    from pytest_lora.inspection.training import LossFn

SHOWN = 10
"""Findings that an assertion spells out; the report on the exception has them all."""

delivered: deque[Report] = deque(maxlen=1000)
"""The latest reports that assertions judged; the pytest plugin takes them out after each test."""


class LoraHealthError(AssertionError):
    """A check found errors. ``report`` holds all its findings."""

    def __init__(self, report: Report) -> None:
        super().__init__("\n".join(report.lines(SHOWN)))
        self.report = report


def stack_level(*packages: str) -> int:
    """``stacklevel`` of a warning of the caller that names the first line outside of these packages."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in packages:
        frame, depth = frame.f_back, depth + 1
    return depth


def demand(report: Report) -> Report:
    """Deliver a report, warn of its warnings at the line that called the assertion, and raise if it has errors.

    Raises:
        LoraHealthError: The report has errors.
        LoraHealthWarning: It has warnings and no errors, and a filter makes them errors; one for all of them.
    """
    __tracebackhide__ = True
    delivered.append(report)
    depth = stack_level("pytest_lora")
    strict: list[str] = []
    for finding in report.warnings:
        try:
            warnings.warn(str(finding), LoraHealthWarning, stacklevel=depth)
        except LoraHealthWarning as warning:
            strict.append(str(warning))
    if not report.ok:
        raise LoraHealthError(report)
    if strict:
        raise LoraHealthWarning("\n\n".join(strict))
    return report


def assert_lora_healthy(
    model: nn.Module,
    *,
    batch: Mapping[str, Any] | Iterable[Any] | None = None,
    steps: int | None = None,
    optimizer: Optimizer | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Assert that a model with LoRA adapters is set up as it should be; see ``check_model``.

    With a batch it also takes some real training steps and judges what they show; see ``check_training``.

    Args:
        model: Anything with PEFT LoRA layers: a ``PeftModel``, a ``PeftMixedModel``, a transformers model
            after ``add_adapter``, and these inside DDP, ``torch.compile`` or a value head.
        batch: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches to train on.
        steps: Optimizer steps to take on it, at least 1; 3 by default.
        optimizer: The optimizer that is going to train it, if there is one already.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        The report, with warnings and infos.

    Raises:
        LoraHealthError: There are errors.
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: A code does not exist, or ``steps`` is out of its range or without a batch.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.model import check_model
    from pytest_lora.checks.training import PROBE_STEPS, check_training

    if steps is not None and batch is None:
        raise ValueError("steps needs a batch to take them with; give batch too")
    # Each looks at the optimizer, but only once is to be heard.
    report = check_model(model, optimizer=optimizer if batch is None else None, expect=expect)
    if batch is not None:
        taken = PROBE_STEPS if steps is None else steps
        trained = check_training(model, batch, optimizer=optimizer, steps=taken, expect=expect)
        report = Report(report.subject, (*report.findings, *trained.findings), trained.exhibits)
    return demand(_selected(report, select, ignore))


def assert_checkpoint_healthy(
    path: str | os.PathLike[str],
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Assert that a saved adapter is whole and fits its base; see ``check_checkpoint``.

    Args:
        path: The adapter's folder, or a file in it; nothing in it is unpickled or executed.
        base: The base that it is for: a live model, a ``PretrainedConfig``, or the path of a model folder or
            ``config.json``; None to compare what the folder says itself.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        The report, with warnings and infos.

    Raises:
        LoraHealthError: There are errors.
        TypeError: An argument has the wrong type.
        ValueError: There is nothing at ``path``, the base cannot be read or built, or a code does not exist.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.checkpoint import check_checkpoint

    return demand(_selected(check_checkpoint(path, base, expect=expect), select, ignore))


def assert_resumable(
    path: str | os.PathLike[str],
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
) -> Report:
    """Assert that training can go on from a saved adapter under a configuration.

    A checkpoint of another rank, other targets, another alpha or another base is refused: LoRA shapes are fixed at
    initialisation, so that the remedy is to start fresh, or to go on with the configuration of the checkpoint.

    Args:
        path: The adapter's folder, or a file in it.
        config: The configuration of the run that is to go on. Its ``base_model_name_or_path`` is compared where it
            is set.
        base: The base, to find out which modules the configuration adapts on it; without one, names are compared,
            and ``target_modules="all-linear"`` is taken to be what it was.

    Returns:
        The report; codes LORA920 to LORA925.

    Raises:
        LoraHealthError: Training cannot go on; the message says why and what to do.
        TypeError: An argument has the wrong type.
        ValueError: There is nothing at ``path``, a field of ``config`` cannot be used, or the base cannot be built.
    """
    __tracebackhide__ = True
    from pytest_lora.inspection.resumption import check_resumable

    return demand(check_resumable(path, config, base))


def assert_loss_decreases(
    model: nn.Module,
    batches: Mapping[str, Any] | Iterable[Any],
    *,
    steps: int = 20,
    by: float | None = None,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    loss_fn: LossFn | None = None,
    device: str | torch.device | None = None,
) -> LossDrop:
    """Assert that some training steps lower the loss, and that the adapter has a share in it.

    The mean loss of the same fixed batches is compared before and after, without dropout, so that two runs of the same
    set-up differ by rounding only. A loss that a head alone lowers does not pass, nor one that is NaN. Afterwards the
    model, the optimizer and the random states are bit for bit what they were.

    Args:
        model: Anything with PEFT LoRA layers; see ``check_model``.
        batches: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches, used in order and over
            again; at most ``steps`` are used.
        steps: Optimizer steps, at least 1.
        by: The relative drop that is asked for, such as 0.1 for 10 %. By default 1 %, or 0.05 % where ``optimizer`` or
            ``lr`` is given, which may be made for thousands of steps.
        optimizer: The optimizer of the real run. By default an AdamW over everything that requires gradients.
        lr: Learning rate of that AdamW. By default one that suits rank, scaling and number of the adapters.
        loss_fn: Called with the model and a batch, gives a scalar loss; by default the loss that the model returns.
        device: Where to run, such as ``"cpu"``. By default the GPU where there is one and no optimizer is given.

    Returns:
        The measurement: ``before``, ``after``, ``drop``, ``curve``, ``lr``.

    Raises:
        LoraHealthError: The loss did not fall by as much; the message has the curve and the likely reasons.
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: An argument is out of its range, there is no batch, or the model gives no loss for one.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.training import measure_loss_drop

    report, drop = measure_loss_drop(
        model, batches, steps=steps, by=by, optimizer=optimizer, lr=lr, loss_fn=loss_fn, device=device
    )
    demand(report)
    return drop


def assert_config_healthy(
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Assert that a ``LoraConfig`` fits the base it is for; see ``check_config``.

    Args:
        config: The configuration.
        base: A live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Raises:
        LoraHealthError: There are errors.
        TypeError: An argument has the wrong type.
        ValueError: The base cannot be read or built, or a code does not exist.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.config import check_config

    return demand(_selected(check_config(config, base, expect=expect), select, ignore))


def _selected(report: Report, select: Iterable[str], ignore: Iterable[str]) -> Report:
    from pytest_lora.rules import selected

    return report.with_findings(selected(report.findings, select, ignore))


def assert_fits_memory(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    config: LoraConfig,
    *,
    batch_size: int,
    seq_len: int,
    budget: str | int | torch.device,
    advise: bool = True,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    **setting: Any,
) -> Report:
    """Assert that a training step fits the memory of a GPU, without a GPU; see ``check_memory``.

    Args:
        base: As for ``estimate_memory``.
        config: The adapter.
        batch_size: Sequences (or images) in a micro-batch.
        seq_len: Tokens in each, padding included.
        setting: The other arguments of ``estimate_memory``.
        budget: GPU memory: ``"24GiB"``, whole bytes, or a CUDA device (``"cuda:0"``), which is asked.
        advise: Whether other settings are estimated where it does not fit, which takes a second or two. A
            search over many settings does without.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        The report, with warnings and infos.

    Raises:
        LoraHealthError: It does not fit; the message has what fills the budget and, with ``advise``, what
            would fit.
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or the step cannot be traced.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.memory import check_memory

    report = check_memory(
        base,
        config,
        batch_size=batch_size,
        seq_len=seq_len,
        budget=budget,
        advise=advise,
        expect=expect,
        **setting,
    )
    return demand(_selected(report, select, ignore))


def assert_param_ratio(model: nn.Module, low: float = 0.0005, high: float = 0.01) -> Report:
    """Assert that the share of trainable parameters lies in a band.

    Both sides are logical: 4-bit weights count as what they stand for (see ``count_parameters``).

    Args:
        model: A model that carries LoRA layers.
        low: Smallest share, as a fraction. Default 0.05 %.
        high: Largest share, as a fraction. Default 1 %. LoRA (arXiv:2106.09685) trains 0.003 to 0.6 % of a
            large base; tiny test models need a band of their own.

    Raises:
        LoraHealthError: The share lies outside (LORA901).
        TypeError: ``model`` carries no LoRA layers, or a bound is no number.
        ValueError: A bound is no fraction from 0 to 1, or ``low`` is above ``high``.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.properties import parameter_ratio

    return demand(parameter_ratio(model, low, high))


def assert_alpha_ratio(model_or_config: nn.Module | LoraConfig, expected: float = 2.0) -> Report:
    """Assert that the effective scaling of every adapted module is one number.

    The scaling is ``alpha / r``, under rsLoRA ``alpha / sqrt(r)``, with ``rank_pattern`` and
    ``alpha_pattern`` applied. On a model it is read from every module with every adapter; of a
    ``LoraConfig`` alone, the default and each pattern key are judged as if some module took them.

    Args:
        model_or_config: A model that carries LoRA layers, or a ``LoraConfig``.
        expected: The scaling. Default 2, the usual ``alpha = 2 r``.

    Raises:
        LoraHealthError: A scaling differs by more than one part in a million (LORA902).
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: ``expected`` is not a finite number above 0, or a configured rank is below 1.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.properties import scaling

    return demand(scaling(model_or_config, expected))


def assert_adapter_shapes(
    model: nn.Module,
    targets: str | Iterable[str] | None = None,
    *,
    batch: Mapping[str, Any] | Iterable[Any] | None = None,
    steps: int = 2,
    loss_fn: LossFn | None = None,
) -> Report:
    """Assert that the factors of every adapter fit its rank and its base weight.

    With a batch it also takes real optimizer steps, and asserts that what moved is low-rank: the change of each
    adapted weight, ``scaling * B @ A`` after the steps less what it was before, together with what the base weight
    itself moved by, has a numerical rank of r at most, and the base weight did not move. Where ``B @ A`` was not
    zero before, as in a trained adapter or under PiSSA, the bound is 2 r: the difference of two products of rank r is
    one product with twice as many columns, ``[B B'] [A; -A']``. The magnitude of DoRA, which rescales whole rows, is
    left out. Afterwards everything is bit for bit what it was.

    Args:
        model: A model that carries LoRA layers.
        targets: What must be adapted, all of it and nothing else, written as PEFT's ``target_modules``:
            module names or their last parts, a regular expression for full names, or ``"all-linear"``. A
            module counts as adapted when any adapter is on it.
        batch: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches to train on.
        steps: Optimizer steps to take on it, at least 1. The second is the first that moves ``lora_A``.
        loss_fn: Called with the model and a batch, gives a scalar loss; by default the loss that the model returns.

    Raises:
        LoraHealthError: A shape does not fit, modules are missing or unexpected, an update has too high a rank, a
            base weight moved, or no adapter moved at all (LORA903).
        TypeError: ``model`` carries no LoRA layers, ``targets`` is neither names nor a pattern, or another argument
            has the wrong type.
        ValueError: ``targets`` is empty or no regular expression, ``steps`` is below 1, ``loss_fn`` is without a
            batch, or the model gives no loss.
    """
    __tracebackhide__ = True
    from pytest_lora.arguments import require_steps, require_trainers
    from pytest_lora.checks.properties import Trial, adapter_shapes
    from pytest_lora.checks.training import PROBE_RATE

    require_steps(steps)
    require_trainers(None, None, None, loss_fn)
    if loss_fn is not None and batch is None:
        raise ValueError("loss_fn needs a batch to make a loss of; give batch too")
    trial = None if batch is None else Trial(batch, steps, PROBE_RATE, loss_fn)
    return demand(adapter_shapes(model, targets, trial))


def assert_reload_exact(
    model: nn.Module, batch: Any, *, base: nn.Module | Callable[[], nn.Module] | None = None
) -> Report:
    """Assert that saving the adapters and loading them on a fresh base gives the same output, bit for bit.

    A copy of the model is saved into a temporary folder with the model's own ``save_pretrained`` and loaded on
    the base; both run the batch in evaluation mode, with adapters unmerged and enabled. Task heads and token rows
    are part of it, buffers that change whenever the model runs are not. The model itself is neither run nor changed;
    memory for two copies of it is needed for a moment.

    Args:
        model: A ``PeftModel`` or a transformers model after ``add_adapter``, also inside DDP,
            ``torch.compile`` or a value head (which PEFT does not save, and which is not compared). Of several
            adapters after ``add_adapter`` the one that is active is saved and compared.
        batch: A mapping of arguments, a tuple of them, or one tensor, on the model's device.
        base: The base to load on, or a function that makes it; without, the base under the adapters, with
            weights that were trained there set to zero so that only the checkpoint can bring them back. It must be
            given after PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA, which rewrote the weights under the adapter.

    Returns:
        The report; codes LORA910 to LORA914.

    Raises:
        LoraHealthError: The reloaded model is not the same; the message says which tensors are missing or
            differ, and how to have them saved.
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: The model cannot be copied or saved, does not take the batch, or gives random or no finite numbers
            for it; ``base`` is needed, cannot be made, carries adapters, or is given for a model that is merged.
        OSError: The temporary folder cannot be written.
    """
    __tracebackhide__ = True
    from pytest_lora.inspection.behaviour.reload import check_reload

    return demand(check_reload(model, batch, base=base))


def assert_merge_exact(
    model: nn.Module, batch: Any, *, rtol: float | None = None, atol: float | None = None
) -> Report:
    """Assert that merging keeps the output, unmerging restores the weights, and unloading gives the base back.

    All is done on copies, with adapters enabled: the model itself is neither run nor changed. On a quantized base a
    merge rounds the weights again; how much that moves the output, and how that compares with what the adapter does,
    is an info, or a warning where it is more than half.

    Args:
        model: Anything with PEFT LoRA layers.
        batch: A mapping of arguments, a tuple of them, or one tensor, on the model's device.
        rtol: Deviation of the output that is allowed, relative to its largest value. By default that of the
            coarsest dtype of the adapted weights: 1e-4 for float32, 4e-3 for float16, 3e-2 for bfloat16.
        atol: Deviation allowed on top.

    Returns:
        The report; codes LORA915 to LORA919.

    Raises:
        LoraHealthError: The merged output, the unmerged weights or the unloaded base are not what they were.
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: The model cannot be copied, does not take the batch, or gives random or no finite numbers for it;
            a tolerance is negative.
    """
    __tracebackhide__ = True
    from pytest_lora.inspection.behaviour.merge import check_merge

    return demand(check_merge(model, batch, rtol=rtol, atol=atol))


def assert_lora_laws(model: nn.Module, batch: Any) -> Report:
    """Assert the laws that every sound LoRA keeps, whatever it has learned.

    With B = 0 the adapter changes nothing (not under DoRA); disabled, the model is its base bit for bit; merged it
    gives what it gave unmerged, and unmerged again it has the same weights; saved and loaded it is bit for bit what
    it was; each layer's effect is linear in its scaling (not under DoRA); padding the rank with zeros changes
    nothing; and a second adapter that is not active changes nothing. Laws that do not apply to a model are left
    out: what is not a ``PeftModel`` gets no second adapter, a fused parameter and attention as a whole no law of a
    single layer. Done on copies: the model is left bit for bit as it was.

    Args:
        model: A model that carries LoRA layers.
        batch: What the model is called with: a mapping, a tuple or a tensor.

    Returns:
        An empty report.

    Raises:
        LoraHealthError: A law is broken (LORA930 to LORA934, or the errors of ``assert_merge_exact`` and
            ``assert_reload_exact``).
        TypeError: ``model`` carries no LoRA layers, or ``batch`` has another form.
        ValueError: The model cannot be copied, does not take the batch, or gives random or no finite numbers for it.
    """
    __tracebackhide__ = True
    from pytest_lora.inspection.behaviour.laws import check_lora_laws

    return demand(check_lora_laws(model, batch))
