"""A live model with adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora.arguments import (
    require_expect,
)
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.drawing import (
    model_maps,
)
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def check_model(
    model: nn.Module, *, optimizer: Optimizer | None = None, expect: Expect | None = None
) -> Report:
    """Judge a model that carries LoRA adapters; it is looked at, never run or changed.

    Args:
        model: Anything with PEFT LoRA layers: a ``PeftModel``, a ``PeftMixedModel``, a transformers model
            after ``add_adapter``, and these inside DDP, ``torch.compile`` or a value head.
        optimizer: The optimizer that is going to train it, if there is one already.
        expect: What is meant, where only the user can know it.

    Returns:
        A report with the rules of the stages *config* (1xx, for the active adapters) and *model* (2xx),
        and those on the optimizer (3xx) where one is given.

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
    """
    from pytest_lora.inspection.model import model_facts
    from pytest_lora.inspection.training import optimizer_facts

    expect = require_expect(expect)
    facts = model_facts(model)
    judged: list[object] = [facts, *(c for c in facts.configs if c.adapter in facts.active)]
    if optimizer is not None:
        judged.append(optimizer_facts(model, optimizer))
    subject = f"{type(model).__name__} of {facts.base.title}"
    return Report(subject, tuple(judge(judged, expect)), model_maps(facts))
