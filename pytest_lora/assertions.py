"""Assertions: the checks, raising. Errors fail, warnings warn, infos stay in the report."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

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
