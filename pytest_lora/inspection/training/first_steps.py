"""The first optimizer steps of somebody else's run, watched from outside, as facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from pytest_lora.facts.steps import StepFacts
from pytest_lora.facts.training import Objective, TrainingFacts
from pytest_lora.inspection.model import adapted_survey, model_facts
from pytest_lora.inspection.training.circumstances import repacked_layers
from pytest_lora.inspection.training.optimizer import (
    as_float,
    optimizer_facts,
    param_groups,
    parameter_parts,
    schedule_facts,
)
from pytest_lora.inspection.training.watch import Watch


class FirstSteps:
    """Gradients and moves at the first steps of a real run; nothing is run, drawn or changed.

    To be made right before the first step, with the gradients in place. What trains is copied until the facts are
    taken, to see it move.

    Args:
        model: The model.
        optimizer: What trains it.
        schedule: Its learning-rate schedule, or None.
        scaler: Whether a GradScaler scales the loss.
        objective: What the trainer trains for.
        total_steps: Optimizer steps that the run is to take, where that is known.

    Raises:
        TypeError: The model carries no LoRA layers, or the optimizer has no ``param_groups``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        scaler: bool,
        objective: Objective = "",
        total_steps: int | None = None,
    ) -> None:
        found = adapted_survey(model)
        self._objective: Objective = objective
        self._total_steps = total_steps
        self._is_fresh = not any(getattr(optimizer, "state", {}).values())
        self._optimizer = optimizer
        self._schedule = schedule
        self._scaler = scaler
        self._model = model_facts(model)
        self._described = optimizer_facts(model, optimizer)
        self._repacked = tuple(repacked_layers(found))
        held = {id(p) for group in param_groups(optimizer) for p in group["params"]}
        self._watch = Watch(model, parameter_parts(found), held)
        self._seen: list[tuple[tuple[float, ...], float | None]] = []

    @property
    def count(self) -> int:
        """Steps that were seen."""
        return len(self._seen)

    def before_step(self) -> None:
        """Note the gradients that the coming step will use."""
        rates = tuple(as_float(group.get("lr")) for group in param_groups(self._optimizer))
        self._seen.append((rates, self._watch.note_gradients()))

    def after_step(self) -> None:
        """Note how far the step moved what trains."""
        self._watch.note_moves()

    @property
    def overflowed(self) -> bool:
        """Whether a GradScaler was still finding its scale at every step, so that the gradients say nothing."""
        return self._scaler and not any(norm is None or math.isfinite(norm) for _, norm in self._seen)

    def facts(self, losses: Sequence[float]) -> TrainingFacts:
        """What was seen, with the loss of each step; batches and labels are unknown, and gradients are clipped."""
        return TrainingFacts(
            model=self._model,
            optimizer=self._described,
            optimizer_given=True,
            schedule=schedule_facts(self._schedule, self._optimizer) if self._schedule is not None else None,
            max_grad_norm=None,
            scaler=self._scaler,
            custom_loss=True,
            steps=tuple(
                # The loss has a graph, or backward() would have raised. No batch comes twice.
                StepFacts(batch=index, loss=loss, has_graph=True, rates=rates, gradient_norm=norm)
                for index, (loss, (rates, norm)) in enumerate(zip(losses, self._seen, strict=True))
            ),
            tensors=self._watch.facts(),
            untouched=(),
            labels=(),
            batches=self.count,
            inputs=(),
            history=(),
            changes=(),
            dropouts=(),
            repacked=self._repacked,
            objective=self._objective,
            optimizer_is_fresh=self._is_fresh,
            total_steps=self._total_steps,
        )
