"""Rows of somebody else's run, as facts; no step is taken."""

from __future__ import annotations

from typing import Any

from torch import nn

from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.facts.training import Objective, TrainingFacts
from pytest_lora.inspection.behaviour.texts import pad_token
from pytest_lora.inspection.model import adapted_survey, model_facts
from pytest_lora.inspection.training.answers import answer_facts
from pytest_lora.inspection.training.circumstances import spoiled_inputs
from pytest_lora.inspection.training.empty_rows import empty_rows
from pytest_lora.inspection.training.labels import label_facts
from pytest_lora.inspection.training.media import medium_facts
from pytest_lora.inspection.training.special_tokens import vocabulary
from pytest_lora.inspection.training.whole_targets import whole_targets


def row_facts(
    model: nn.Module, batches: tuple[Any, ...], objective: Objective, *, custom_loss: bool
) -> TrainingFacts:
    """What batches hold that a model is trained on; nothing is run, drawn or changed.

    Raises:
        TypeError: The model carries no LoRA layers.
    """
    found, facts = adapted_survey(model), model_facts(model)
    return TrainingFacts(
        model=facts,
        optimizer=OptimizerFacts(optimizer="", held=(), missing=(), frozen=0, foreign=0, groups=()),
        optimizer_given=False,
        schedule=None,
        max_grad_norm=None,
        scaler=False,
        custom_loss=custom_loss,
        steps=(),
        tensors=(),
        untouched=(),
        labels=tuple(label_facts(batches, vocabulary(found.root, facts.base))),
        batches=len(batches),
        inputs=tuple(dict.fromkeys(name for batch in batches for name in batch)),
        history=(),
        changes=(),
        dropouts=(),
        repacked=(),
        spoiled=tuple(spoiled_inputs(batches)),
        objective=objective,
        media=tuple(medium_facts(batches, found.root)),
        empty_rows=tuple(empty_rows(batches, found.modules, facts.base, pad_token(found.root))),
        answers=tuple(answer_facts(batches)),
        whole_targets=tuple(whole_targets(batches, found.root, facts.base)),
    )
