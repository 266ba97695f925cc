"""The first rows of a Trainer's data, judged before its first step."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    from torch import nn

    from pytest_lora.expect import Expect
    from pytest_lora.facts.training import Objective

WHAT = "labels, padding and other rules on batches"


def report_on_rows(
    model: nn.Module, loader: Any, rows: int, objective: Objective, expect: Expect, *, custom_loss: bool
) -> Report:
    """Judge the first rows of a loader; why they cannot be read stands in the report."""
    from pytest_lora.inspection.training import first_rows, row_facts

    batches, why = first_rows(loader, rows)
    if not batches:
        return Report("first rows", (), not_judged=((why, WHAT),) if why else ())
    facts = row_facts(model, batches, objective, custom_loss=custom_loss)
    return Report(f"first rows of {facts.model.base.architecture}", tuple(judge([facts], expect)))


def has_own_loss(callback: object) -> bool:
    """Whether the Trainer that calls a callback makes its loss otherwise than transformers and TRL do.

    A Trainer hands itself to no callback; it is looked for among the frames that called this one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer: Any = frame.f_locals.get("self")
        handler = getattr(trainer, "callback_handler", None)
        if handler is not None and callback in getattr(handler, "callbacks", ()):
            home = type(trainer).compute_loss.__module__.partition(".")[0]
            return getattr(trainer, "compute_loss_func", None) is not None or home not in (
                "transformers",
                "trl",
            )
        frame = frame.f_back
    return True
