"""Assertions: the checks, raising. Errors fail, warnings warn, infos stay in the report."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pytest_lora.findings import LoraHealthWarning, Report

if TYPE_CHECKING:
    import os

    from peft import LoraConfig
    from torch import nn
    from torch.optim import Optimizer
    from transformers import PretrainedConfig

    from pytest_lora.expect import Expect

SHOWN = 10
"""Findings that an assertion spells out; the report on the exception has them all."""

delivered: deque[Report] = deque(maxlen=1000)
"""The latest reports that assertions judged; the pytest plugin takes them out after each test."""


class LoraHealthError(AssertionError):
    """A check found errors. ``report`` holds all its findings."""

    def __init__(self, report: Report) -> None:
        super().__init__("\n".join(report.lines(SHOWN)))
        self.report = report


def demand(report: Report) -> Report:
    """Deliver a report, warn of its warnings, and raise if it has errors.

    Raises:
        LoraHealthError: The report has errors.
    """
    __tracebackhide__ = True
    delivered.append(report)
    for finding in report.warnings:
        warnings.warn(str(finding), LoraHealthWarning, stacklevel=3)
    if not report.ok:
        raise LoraHealthError(report)
    return report


def assert_lora_healthy(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Assert that a model with LoRA adapters is set up as it should be; see ``check_model``.

    Args:
        model: Anything with PEFT LoRA layers: a ``PeftModel``, a ``PeftMixedModel``, a transformers model
            after ``add_adapter``, and these inside DDP, ``torch.compile`` or a value head.
        optimizer: The optimizer that is going to train it, if there is one already.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        The report, with warnings and infos.

    Raises:
        LoraHealthError: There are errors.
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: A code does not exist.
    """
    __tracebackhide__ = True
    from pytest_lora.checks import check_model

    report = check_model(model, optimizer=optimizer, expect=expect)
    return demand(_selected(report, select, ignore))


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
    from pytest_lora.checks import check_config

    return demand(_selected(check_config(config, base, expect=expect), select, ignore))


def _selected(report: Report, select: Iterable[str], ignore: Iterable[str]) -> Report:
    from pytest_lora.rules import selected

    return Report(report.subject, tuple(selected(report.findings, select, ignore)))


def assert_reload_exact(
    model: nn.Module, batch: Any, *, base: nn.Module | Callable[[], nn.Module] | None = None
) -> Report:
    """Assert that saving the adapters and loading them on a fresh base gives the same output, bit for bit.

    A copy of the model is saved into a temporary folder with the model's own ``save_pretrained`` and loaded on
    the base; both run the batch in evaluation mode. Task heads and token rows are part of it. The model itself
    is neither run nor changed; memory for two copies of it is needed for a moment.

    Args:
        model: A ``PeftModel`` or a transformers model after ``add_adapter``, also inside DDP,
            ``torch.compile`` or a value head (which PEFT does not save, and which is not compared).
        batch: A mapping of arguments, a tuple of them, or one tensor, on the model's device.
        base: The base to load on, or a function that makes it; without, the base under the adapters, with
            weights that were trained there set to zero so that only the checkpoint can bring them back.

    Returns:
        The report; codes LORA910 to LORA914.

    Raises:
        LoraHealthError: The reloaded model is not the same; the message says which tensors are missing or
            differ, and how to have them saved.
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: The model cannot be copied or saved, its output is random, or ``base`` carries adapters.
    """
    __tracebackhide__ = True
    from pytest_lora.roundtrip import check_reload

    return demand(check_reload(model, batch, base=base))


def assert_merge_exact(
    model: nn.Module, batch: Any, *, rtol: float | None = None, atol: float | None = None
) -> Report:
    """Assert that merging keeps the output, unmerging restores the weights, and unloading gives the base back.

    All is done on copies: the model itself is neither run nor changed. On a quantized base a merge rounds the
    weights again; how much that moves the output, and how that compares with what the adapter does, is an info,
    or a warning where it is more than half.

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
        ValueError: The model cannot be copied, its output is random, or a tolerance is negative.
    """
    __tracebackhide__ = True
    from pytest_lora.roundtrip import check_merge

    return demand(check_merge(model, batch, rtol=rtol, atol=atol))
