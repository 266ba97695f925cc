"""Assertions: each check, raising. Errors fail, warnings warn (or fail too, where strict), infos stay in the report.

An assertion takes what its check takes, in the same order, and returns the same report.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from pytest_lora.arguments import refusing
from pytest_lora.checks.behaviour import check_lora_laws, check_merge, check_reload
from pytest_lora.checks.checkpoint import check_checkpoint, check_resume
from pytest_lora.checks.config import check_config
from pytest_lora.checks.memory import check_memory
from pytest_lora.checks.model import check_adapters_in_sync, check_model
from pytest_lora.checks.properties import check_adapter_shapes, check_alpha_ratio, check_param_ratio
from pytest_lora.checks.recipe import check_recipe, check_run
from pytest_lora.checks.training import check_loss_decreases, check_training, diagnose_history
from pytest_lora.findings import LoraHealthWarning, Report
from pytest_lora.inspection.quiet import unexplained
from pytest_lora.rules.selection import in_force

P = ParamSpec("P")

SHOWN = 10
"""Findings that an assertion spells out; the report on the exception has them all."""

delivered: deque[Report] = deque(maxlen=1000)
"""The latest reports that assertions judged; the pytest plugin takes them out after each test."""


class LoraHealthError(AssertionError):
    """A check found errors. ``report`` holds all its findings; the first line of the message their codes."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"{', '.join(report.codes)}: " + "\n".join(report.lines(SHOWN)))
        self.report = report


LoraHealthError.__module__ = "pytest_lora"


def stack_level(*packages: str) -> int:
    """``stacklevel`` of a warning of the caller that names the first line outside of these packages."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in packages:
        frame, depth = frame.f_back, depth + 1
    return depth


def demand(report: Report) -> Report:
    """Deliver a report, warn of its warnings at the line that called the assertion, and raise if it has errors.

    Raises:
        LoraHealthError: The report has errors, or warnings in a session that is strict.
        LoraHealthWarning: It has warnings and no errors, and a filter makes them errors; one for all of them.
    """
    __tracebackhide__ = True
    delivered.append(report)
    if in_force().strict and report.codes:
        raise LoraHealthError(report)
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


def asserting(check: Callable[P, Report], name: str) -> Callable[P, Report]:
    """The assertion of a check: the same arguments, the same report, and errors raise ``LoraHealthError``."""

    @wraps(check)
    def asserted(*args: P.args, **kwargs: P.kwargs) -> Report:
        __tracebackhide__ = True
        with unexplained():
            report = check(*args, **kwargs)
        return demand(report)

    doc = (check.__doc__ or "").replace(
        "    Raises:\n", "    Raises:\n        LoraHealthError: There are errors.\n", 1
    )
    asserted.__doc__ = f"Raise ``LoraHealthError`` where ``{check.__name__}`` finds errors.\n\n    {doc}"
    asserted.__module__ = __name__
    return refusing(asserted, name)


assert_adapters_in_sync = asserting(check_adapters_in_sync, "assert_adapters_in_sync")
assert_adapter_shapes = asserting(check_adapter_shapes, "assert_adapter_shapes")
assert_alpha_ratio = asserting(check_alpha_ratio, "assert_alpha_ratio")
assert_checkpoint_healthy = asserting(check_checkpoint, "assert_checkpoint_healthy")
assert_config_healthy = asserting(check_config, "assert_config_healthy")
assert_fits_memory = asserting(check_memory, "assert_fits_memory")
assert_history_healthy = asserting(diagnose_history, "assert_history_healthy")
assert_lora_healthy = asserting(check_model, "assert_lora_healthy")
assert_lora_laws = asserting(check_lora_laws, "assert_lora_laws")
assert_loss_decreases = asserting(check_loss_decreases, "assert_loss_decreases")
assert_merge_exact = asserting(check_merge, "assert_merge_exact")
assert_param_ratio = asserting(check_param_ratio, "assert_param_ratio")
assert_recipe_healthy = asserting(check_recipe, "assert_recipe_healthy")
assert_reload_exact = asserting(check_reload, "assert_reload_exact")
assert_resumable = asserting(check_resume, "assert_resumable")
assert_run_healthy = asserting(check_run, "assert_run_healthy")
assert_training_healthy = asserting(check_training, "assert_training_healthy")
