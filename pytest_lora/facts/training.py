"""Facts about how adapters are trained: what some real steps showed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pytest_lora.facts.batches import AloneFacts, AnswerFacts, LabelFacts, MediumFacts, WholeTargets
from pytest_lora.facts.curve_shape import LossDrop as LossDrop
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.facts.optimizer import OptimizerFacts, ScheduleFacts
from pytest_lora.facts.steps import (
    BaseChange,
    EmptyRows,
    Failure,
    PaddingFacts,
    ShiftFacts,
    SpreadFacts,
    StepFacts,
    TaughtFacts,
    TensorFacts,
    UpdateFacts,
)

Objective = Literal["", "texts", "DPO", "preferences", "policy"]
"""``"DPO"`` is its loss as it was published, ``"preferences"`` any other loss of chosen and rejected answers."""


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """Some real optimizer steps on a model, watched.

    Attributes:
        model: The model before the steps.
        optimizer: What trained it.
        optimizer_given: Whether that was the user's own.
        schedule: The learning-rate schedule, or None.
        max_grad_norm: Where gradients were clipped, or None.
        scaler: Whether an enabled GradScaler was given.
        custom_loss: Whether the user's own function made the loss.
        steps: The steps; none where the model is only to be evaluated or the labels make a step impossible.
        tensors: Every parameter that may train.
        untouched: Adapted modules that took no part in any forward pass.
        without_graph: Adapted modules that every forward pass ran with gradients off.
        cut: Those of them that reentrant gradient checkpointing ran so, as no input of its segment requires gradients.
        labels: Labels of each batch, where they are of a known form.
        batches: How many batches were given, as far as that is known.
        inputs: Names of what the batches hold that steps were taken on.
        later_inputs: Names of what only the other batches hold.
        history: Losses of the run so far, as the user gave them.
        changes: Weights and buffers of the base that changed.
        dropouts: Modules with a dropout above zero in training mode.
        repacked: 4-bit layers whose weight was repacked for inference on a CPU.
        updates: What the steps did to each adapted weight; measured where the initialisation is not a usual one or the
            plan asks for ranks.
        failure: What kept a step from being taken, or None.
        spoiled: Inputs that hold NaN or infinity, with their batch; masks and biases aside.
        objective: What a trainer trains for, by its own arguments; empty where none says so.
        optimizer_is_fresh: Whether the optimizer given had taken no step before.
        switched_off: Whether a forward pass ran with the adapters switched off, as a reference of the loss.
        references: Adapters, not active before the steps, that took part in a forward pass with gradients off.
        alone: A text on its own against the same text in its batch, where one has company there.
        media: Images, videos and audio of each batch, where the model knows any.
        shift: The first loss beside what the logits give with and without the shift, where that can be asked.
        taught: Which token the first loss asks for, where its gradient at the logits tells.
        empty_rows: Tokens of the batches that the base has no values for.
        whole_targets: Whole numbers as labels of a classifier with one output.
        total_steps: Optimizer steps that the run is to take, where it says so.
        answers: Chosen and rejected answers, and masks of answers, of each batch that holds such.
        rows: Rows of the first batch that a step was taken on; 0 where that cannot be told.
        blank: Weights, rewards and masks of answers that are zero throughout every batch that a step was taken on.
        padding: How much of the loss is made of padding, where a loss of the user's own tells.
        odd: Masks of another length than the tokens that they are for, with both shapes.
        spread: What the first loss compares each with each.
        at_itself: Whether an active adapter took part in a forward pass with gradients off, as its own reference.
        thinned: Modules of the base whose dropout acted in a pass with gradients and adapters off, as a reference.
    """

    model: ModelFacts
    optimizer: OptimizerFacts
    optimizer_given: bool
    schedule: ScheduleFacts | None
    max_grad_norm: float | None
    scaler: bool
    custom_loss: bool
    steps: tuple[StepFacts, ...]
    tensors: tuple[TensorFacts, ...]
    untouched: tuple[str, ...]
    labels: tuple[LabelFacts, ...]
    batches: int
    inputs: tuple[str, ...]
    history: tuple[float, ...]
    changes: tuple[BaseChange, ...]
    dropouts: tuple[str, ...]
    repacked: tuple[str, ...]
    updates: tuple[UpdateFacts, ...] = ()
    failure: Failure | None = None
    spoiled: tuple[str, ...] = ()
    objective: Objective = ""
    optimizer_is_fresh: bool = False
    switched_off: bool = False
    references: tuple[str, ...] = ()
    media: tuple[MediumFacts, ...] = ()
    later_inputs: tuple[str, ...] = ()
    without_graph: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    alone: AloneFacts | None = None
    shift: ShiftFacts | None = None
    empty_rows: tuple[EmptyRows, ...] = ()
    whole_targets: tuple[WholeTargets, ...] = ()
    total_steps: int | None = None
    answers: tuple[AnswerFacts, ...] = ()
    rows: int = 0
    blank: tuple[str, ...] = ()
    padding: PaddingFacts | None = None
    odd: tuple[str, ...] = ()
    spread: tuple[SpreadFacts, ...] = ()
    at_itself: bool = False
    taught: TaughtFacts | None = None
    thinned: tuple[str, ...] = ()

    @property
    def is_fresh(self) -> bool:
        """Whether every active adapter is still as it was made: ``lora_B`` zero."""
        layers = self.model.active_layers
        return bool(layers) and all(layer.b.zero for layer in layers)

    @property
    def known_steps(self) -> int | None:
        """Optimizer steps of the whole run: those that its schedule was made for, or that it says it takes."""
        return (self.schedule.planned if self.schedule else None) or self.total_steps

    @property
    def shifts(self) -> bool:
        """Whether the loss compares a label with what was predicted before it, as far as is known."""
        forgotten = self.shift is not None and self.shift.forgotten
        return not forgotten and not (self.taught is not None and self.taught.copies)

    @property
    def compares_answers(self) -> bool:
        """Whether chosen answers are compared with rejected ones, by the trainer or by the names of the inputs."""
        named = {word for name in self.inputs for word in ("chosen", "rejected") if word in name}
        return self.objective in ("DPO", "preferences") or len(named) == 2

    @property
    def rewards_answers(self) -> bool:
        """Whether sampled answers are rewarded, by the trainer or by the names of the inputs."""
        return self.objective == "policy" or any(
            word in n for n in self.inputs for word in ("advantage", "reward")
        )

    @property
    def empty_references(self) -> tuple[str, ...]:
        """Adapters among the references that hold no update anywhere."""
        return tuple(n for n in self.references if all(layer.b.zero for layer in self.model.of(n)))

    @property
    def peak_rate(self) -> float:
        """The largest learning rate that ``lora_B`` is known to get, or ``lora_A`` where only that trains."""
        groups = self.optimizer.groups
        own = [g for g in groups if "b" in g.parts] or [g for g in groups if "a" in g.parts]
        known = [step.rates[group.index] for group in own for step in self.steps]
        if self.schedule and self.schedule.peak:
            known.append(self.schedule.peak)
        else:
            known += [group.initial_lr for group in own if group.initial_lr]
        return max((rate for rate in known if not math.isnan(rate)), default=0.0)

    @property
    def adapter_tensors(self) -> tuple[TensorFacts, ...]:
        """Trainable low-rank factors of active adapters; a magnitude learns without them, but is no adapter."""
        active = set(self.model.active)
        return tuple(t for t in self.tensors if t.trainable and t.adapter in active and t.part in ("a", "b"))

    @property
    def lora_dropout(self) -> float:
        """The largest dropout of an active adapter."""
        return max((layer.dropout for layer in self.model.active_layers), default=0.0)

    @property
    def has_graph(self) -> bool:
        """Whether every loss had a graph."""
        return all(step.has_graph for step in self.steps)

    @property
    def finite(self) -> bool:
        """Whether every loss and every gradient was finite."""
        return all(step.finite for step in self.steps)

    @property
    def rates_are_zero(self) -> bool:
        """Whether no step had a learning rate above zero for anything that the model trains."""
        groups = [g.index for g in self.optimizer.groups if g.parts]
        rates = [step.rates[index] for step in self.steps for index in groups]
        return bool(rates) and not any(rates)

    @property
    def some_rate_is_zero(self) -> bool:
        """Whether a group that holds what the model trains had no learning rate above zero at any step."""
        groups = [g.index for g in self.optimizer.groups if g.parts]
        return any(not any(step.rates[index] for step in self.steps) for index in groups)

    @property
    def labels_ignored(self) -> bool:
        """Whether no label counts in some batch that was run."""
        used = {step.batch for step in self.steps}
        return any(known.labels == 0 for known in self.labels if known.batch in used)

    @property
    def loss_is_zero(self) -> bool:
        """Whether every loss is exactly zero and left no gradient."""
        return bool(self.steps) and all(s.loss == 0 and not s.gradient_norm for s in self.steps)

    @property
    def zero_has_gradient(self) -> bool:
        """Whether some loss, zero in the four decimals that are logged, left a gradient to train by."""
        return any(
            abs(s.loss) < LOGGED_AS_ZERO and s.gradient_norm and math.isfinite(s.gradient_norm)
            for s in self.steps
        )

    @property
    def trains_float16(self) -> bool:
        """Whether the optimizer holds trainable float16 tensors."""
        return any(t.dtype == "float16" and t.trainable and t.held for t in self.tensors)

    @property
    def adapter_learned(self) -> bool:
        """Whether a gradient reached any low-rank factor and a step moved it."""
        return any(t.reached and t.moved for t in self.adapter_tensors)

    @property
    def judges_gradients(self) -> bool:
        """Whether the steps can tell what gradients reach; NaN and losses over nothing hide it."""
        finite = all(math.isfinite(step.loss) for step in self.steps)
        return bool(self.steps) and finite and not self.loss_is_zero and not self.labels_ignored

    @property
    def history_fell(self) -> bool:
        """Whether the losses so far went down."""
        return fell(self.history)

    @property
    def history_is_flat(self) -> bool:
        """Whether there are enough losses so far for a verdict, and they did not go down."""
        return len(self.history) >= HISTORY_NEEDED and not self.history_fell

    @property
    def chance(self) -> float | None:
        """ln(vocabulary): the loss of a language model that knows nothing."""
        limit = next((k.limit for k in self.labels if k.kind in ("causal", "sequence") and k.limit), None)
        return math.log(limit) if limit and limit > 1 else None

    @property
    def unlearning(self) -> tuple[LayerState, ...]:
        """Active adapters on modules, of which no trainable factor saw a gradient other than zero."""
        reached = {(t.module, t.adapter) for t in self.adapter_tensors if t.reached}
        return tuple(
            layer for layer in self.model.active_layers if (layer.module, layer.adapter) not in reached
        )


LOGGED_AS_ZERO = 5e-5
"""The Trainer logs losses below this as 0.0."""

TRIED_OUT = 20
"""Training steps below which a run is a trial of its recipe."""

HISTORY_NEEDED = 5
"""Losses that a verdict on a flat history needs."""


def fell(losses: Iterable[float], by: float = 0.01) -> bool:
    """Whether a curve went down: its last quarter lies, on average, below its first by a relative amount."""
    known = [loss for loss in losses if math.isfinite(loss)]
    quarter = max(1, len(known) // 4)
    if len(known) < 2:
        return False
    first, last = sum(known[:quarter]) / quarter, sum(known[-quarter:]) / quarter
    return last < first - by * abs(first)
