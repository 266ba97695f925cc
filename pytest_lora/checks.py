"""Checks: inspect, judge, report. Each returns a Report and leaves everything as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_lora.expect import Expect
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

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


def diagnose_history(
    train_losses: Iterable[float],
    eval_losses: Iterable[float] | Mapping[int, float] | None = None,
    *,
    total_steps: int | None = None,
    steps_per_loss: int = 1,
    learning_rate: float | None = None,
    expect: Expect | None = None,
) -> Report:
    """Judge the losses that a run has logged so far, and say what a practitioner would do.

    Nothing is run: this is about numbers from a log. Too little evidence is silence, not a guess.

    Args:
        train_losses: Training losses in their order, one or more, in nats per token or alike; from a
            ``Trainer``: ``[x["loss"] for x in trainer.state.log_history if "loss" in x]``. Below ten losses
            only what they show beyond doubt is judged.
        eval_losses: Losses on held-out data: a mapping from optimizer step to loss, or a list, which is
            taken as evenly spaced over the training losses.
        total_steps: Optimizer steps that the run is planned to have, at least 1. A plateau is then judged by
            the share of the run that has passed.
        steps_per_loss: Optimizer steps from one training loss to the next (the Trainer's ``logging_steps``).
        learning_rate: The peak learning rate; advice then says from which to which.
        expect: What is meant; with ``expect.config`` advice on the rank says from which to which.

    Returns:
        A report with the rules on a history (codes LORA340 to LORA359).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no training losses, or a number is outside its range.
    """
    from pytest_lora.facts.history import history_facts

    expect = _require_expect(expect)
    facts = history_facts(
        train_losses,
        eval_losses,
        total_steps=total_steps,
        steps_per_loss=steps_per_loss,
        learning_rate=learning_rate,
    )
    count = len(facts.train)
    subject = f"history of {count} training loss{'es' if count > 1 else ''}"
    return Report(subject, tuple(judge([facts], expect)))


def _require_expect(expect: Any) -> Expect:
    if expect is None:
        return Expect()
    if not isinstance(expect, Expect):
        raise TypeError(f"expect must be an Expect, not {type(expect).__name__}")
    return expect
