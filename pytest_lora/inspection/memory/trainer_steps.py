"""Steps of an installed trainer beside a training step of TRL: evaluations, and a loss that smooths labels."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.memory.trainers import (
    TRL,
    class_of_trl,
    defaults_of,
    trainer_arguments,
    trainer_without_data,
)
from pytest_lora.inspection.skeleton import META

_OF_ONE_GPU = {"device": META, "n_gpu": 1, "world_size": 1}
"""What arguments find out."""


def prediction_step(
    model: nn.Module, transformer: nn.Module, setting: StepSetting, batch: dict[str, Any] | None, keeps: str
) -> tuple[Any, Any, Any]:
    """Loss, logits and labels that the installed trainer takes from a batch of an evaluation.

    Args:
        model: What is called.
        transformer: The base, whose class says what labels are.
        setting: Trainer, and size of the batch.
        batch: Of a trainer that is not of TRL.
        keeps: As of ``Evaluation``.
    """
    transformers: Any = importlib.import_module("transformers")
    if setting.by_trl:
        trainer = trainer_without_data(
            class_of_trl(TRL[setting.trainer].name), model, trainer_arguments(setting), setting
        )
        batch = TRL[setting.trainer].batch(setting)
    else:
        trainer = _of_transformers(model, setting)
    trainer.label_names = transformers.utils.find_labels(type(transformer))
    loss, logits, labels = trainer.prediction_step(model, batch, prediction_loss_only=keeps == "loss")
    if keeps == "predictions" and logits is not None:
        logits = (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)
    return loss, logits, labels


def smoothed_loss(model: nn.Module, setting: StepSetting, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of the installed Trainer where it smooths labels itself: of all logits, outside of the model."""
    loss: torch.Tensor = _of_transformers(model, setting).compute_loss(model, batch)
    return loss


def _of_transformers(model: nn.Module, setting: StepSetting) -> Any:
    transformers: Any = importlib.import_module("transformers")
    values = {**defaults_of(transformers.TrainingArguments), **_OF_ONE_GPU, **dict(setting.args)}
    return trainer_without_data(transformers.Trainer, model, SimpleNamespace(**values), setting)
