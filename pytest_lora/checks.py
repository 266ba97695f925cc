"""Checks: inspect, judge, report. Each returns a Report and leaves everything as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_lora.expect import Expect
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    import os

    from peft import LoraConfig
    from torch import nn
    from torch.optim import Optimizer
    from transformers import PretrainedConfig

    from pytest_lora.facts.base import BaseFacts


def check_config(
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    expect: Expect | None = None,
) -> Report:
    """Judge a ``LoraConfig`` against the base it is for, before anything is built or trained.

    PEFT itself puts the adapter on a copy of the base's structure on the meta device: no weights are read
    but those of a task head, nothing is changed, and what PEFT refuses becomes a finding.

    Args:
        config: The configuration; it is not changed.
        base: A live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.
        expect: What is meant, where only the user can know it.

    Returns:
        A report with the rules of the stage *config* (codes 1xx).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base cannot be read or built.
    """
    from pytest_lora.inspection.config import config_facts

    expect = _require_expect(expect)
    facts = config_facts(config, base)
    return Report(f"LoraConfig on {_named(facts.base)}", tuple(judge([facts], expect)))


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

    expect = _require_expect(expect)
    facts = model_facts(model)
    judged: list[object] = [facts, *(c for c in facts.configs if c.adapter in facts.active)]
    if optimizer is not None:
        judged.append(optimizer_facts(model, optimizer))
    return Report(f"{type(model).__name__} of {_named(facts.base)}", tuple(judge(judged, expect)))


def _named(base: BaseFacts) -> str:
    packed = next((m.quantization for m in base.modules if m.quantization), None)
    return f"{base.architecture} in {packed}" if packed else base.architecture


def _require_expect(expect: Any) -> Expect:
    if expect is None:
        return Expect()
    if not isinstance(expect, Expect):
        raise TypeError(f"expect must be an Expect, not {type(expect).__name__}")
    return expect
