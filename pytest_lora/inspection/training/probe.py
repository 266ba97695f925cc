"""Some real optimizer steps on a model, watched, as facts; everything is put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.batches import AloneFacts, LabelFacts, WholeTargets
from pytest_lora.facts.model import unusual_inits
from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.facts.steps import Failure, Phase, StepFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.behaviour.texts import pad_token
from pytest_lora.inspection.bitsandbytes_internals import keep_packing
from pytest_lora.inspection.model import adapted_survey, model_facts
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.training.batches import (
    Plan,
    generators_of,
    loss_of,
    names_of,
    require_batches,
    take_batches,
    take_step,
)
from pytest_lora.inspection.training.beside import Beside
from pytest_lora.inspection.training.circumstances import (
    Passed,
    Ran,
    blank_inputs,
    live_dropouts,
    odd_masks,
    repacked_layers,
    row_count,
    spoiled_inputs,
)
from pytest_lora.inspection.training.failures import StepError, failure_of
from pytest_lora.inspection.training.labels import label_facts
from pytest_lora.inspection.training.media import medium_facts
from pytest_lora.inspection.training.optimizer import (
    as_float,
    default_optimizer,
    group_numbers,
    optimizer_facts,
    param_groups,
    parameter_parts,
    schedule_facts,
    suitable_rate,
)
from pytest_lora.inspection.training.rows import answer_facts, empty_rows, whole_targets
from pytest_lora.inspection.training.special_tokens import vocabulary
from pytest_lora.inspection.training.updates import Updates, since_probe, since_snapshot
from pytest_lora.inspection.training.watch import Watch


def training_facts(model: nn.Module, batches: Any, plan: Plan) -> TrainingFacts:
    """Take some real steps and say what was seen; the model and all that trains it are left as they were.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or ``batches`` has another form.
        ValueError: There is no batch, the model gives no loss for one, or it could not be put back.
        NotRestoredError: Something changed that could not be put back.
    """
    with prepared(model, batches, plan) as (probe, keeper):
        taken = take_batches(batches, plan.steps, plan.loss_fn)
        keeper.keep(taken[: plan.steps])
        given = (
            len(batches) if isinstance(batches, Sized) and not isinstance(batches, Mapping) else len(taken)
        )
        probe.take(taken)
        probe.run()
        facts = probe.facts(given)
        return replace(facts, alone=probe.batch_law()) if facts.steps else facts


@contextmanager
def prepared(
    model: nn.Module, batches: Any, plan: Plan, device: torch.device | None = None
) -> Iterator[tuple[Probe, Keeper]]:
    """A probe of a model that can be trained inside and is afterwards what it was; no batch is taken yet.

    Gradients are on and empty, and 4-bit weights are never repacked.
    """
    adapted_survey(model)
    if any(parameter.is_meta and parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: its adapter is on the meta device and has no values; load its weights first")
    require_batches(batches, plan.loss_fn)
    with Keeper(model, *plan.kept, generators=generators_of(batches)) as keeper:
        keeper.clear_gradients()
        keep_packing(model)
        if device is not None:
            model.to(device)
        with torch.inference_mode(False), torch.enable_grad():
            yield Probe(model, plan, keeper), keeper


_NO_OPTIMIZER = OptimizerFacts(optimizer="AdamW", held=(), missing=(), frozen=0, foreign=0, groups=())
"""Of a model in which nothing is to be trained."""


class Probe:
    """Some steps on a model and what is seen on the way."""

    def __init__(self, model: nn.Module, plan: Plan, keeper: Keeper) -> None:
        self._model = model
        self._plan = plan
        self._keeper = keeper
        self._found = adapted_survey(model)
        self._facts = model_facts(model)
        self._snapshot = tuple(since_snapshot(model, self._found, plan.base_snapshot or {}))
        self.rate = suitable_rate(self._facts.active_layers) if plan.rate is None else plan.rate
        self._optimizer: Any = plan.optimizer or default_optimizer(model, self.rate)
        self._described = optimizer_facts(model, self._optimizer) if self._optimizer else _NO_OPTIMIZER
        self._schedule = schedule_facts(plan.scheduler, self._optimizer) if plan.scheduler else None
        self._batches: tuple[Any, ...] = ()
        self._labels: tuple[LabelFacts, ...] = ()
        self._whole: tuple[WholeTargets, ...] = ()
        self._passed = Passed()
        self._is_fresh = plan.optimizer is not None and not any(plan.optimizer.state.values())
        self._watch = Watch(model, parameter_parts(self._found), group_numbers(self._groups))
        self._steps: list[StepFacts] = []
        self._failure: Failure | None = None
        self._schedule_over = False
        self._beside = Beside(model, self._found.root, plan, self._passed)
        measured = plan.ranks or bool(unusual_inits(self._facts))
        self._updates = Updates(self._found, keeper) if measured and plan.steps else None

    def take(self, batches: tuple[Any, ...]) -> None:
        """Take the batches for the steps, and look at their labels."""
        self._batches = batches
        self._whole = tuple(whole_targets(batches, self._found.root, self._facts.base))
        self._words = vocabulary(self._found.root, self._facts.base)
        self._labels = tuple(label_facts(batches, self._words))

    @property
    def runnable(self) -> bool:
        """Whether a forward pass cannot fail at a label or token that does not exist.

        On a GPU such a one would take the whole process with it.
        """
        return not any(known.outside or known.ids_outside for known in self._labels)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return param_groups(self._optimizer) if self._optimizer else []

    def run(self) -> None:
        """Take the steps."""
        if not self.runnable:
            return
        self._passed.follow(self._found.lora)
        for index in range(self._plan.steps):
            batch = index % len(self._batches)
            try:
                if not self._step(index + 1, batch):
                    break
            except StepError as failed:
                self._failure = failed.failure
                break

    def batch_law(self) -> AloneFacts | None:
        """A text alone against the same text in its batch, where that can be asked."""
        used = dict(enumerate(self._batches[: len(self._steps)]))
        return None if self._failure is not None else self._beside.batch_law(used)

    def _step(self, number: int, batch: int) -> bool:
        """Take one step; False if no further one can be taken."""
        plan = self._plan
        noting = partial(self._noting, number=number, batch=batch)
        scaler = plan.scaler if plan.scaler is not None and plan.scaler.is_enabled() else None
        for p in (*self._model.parameters(), *(p for group in self._groups for p in group["params"])):
            p.grad = None
        given = self._batches[batch]
        graphs = all(step.has_graph for step in self._steps)
        self._beside.begin(number, batch, given, self._words, graphs=graphs)
        with noting("forward pass"), self._beside.hearing(number):
            loss = loss_of(self._model, given, plan.loss_fn)
        self._beside.loss_made(loss, batch, given, self._labels)
        has_graph = loss.requires_grad
        if has_graph:
            with noting("backward pass"):
                (scaler.scale(loss) if scaler else loss).backward()
        self._beside.followed_back(batch, given, self._labels)
        unscaled = not scaler or not has_graph or self._unscale(scaler)
        self._steps.append(
            StepFacts(
                batch=batch,
                loss=float(loss.detach()),
                has_graph=has_graph,
                rates=tuple(as_float(group.get("lr")) for group in self._groups),
                gradient_norm=self._watch.note_gradients(),
            )
        )
        self._watch.note_rows(given)
        if has_graph and unscaled and self._optimizer:
            with noting("optimizer step"):
                self._update(scaler, given)
        self._watch.note_moves()
        return unscaled

    @contextmanager
    def _noting(self, phase: Phase, *, number: int, batch: int) -> Iterator[None]:
        """Note an error that tells what is wrong with the set-up; others, and those of the user's loss, go on."""
        try:
            yield
        except Exception as error:
            given = "optimizer" if phase == "optimizer step" else "batches"
            error.add_note(f"{given}: raised in the {phase} of step {number}")
            if self._plan.loss_fn is not None or not self._plan.tell_failures:
                raise
            given = self._batches[batch]
            failure = failure_of(error, phase, self._found.root, given, step=number, index=batch)
            if failure is None:
                raise
            raise StepError(failure) from error

    def _unscale(self, scaler: Any) -> bool:
        """Divide gradients by the loss scale; False where torch refuses to, as for float16 weights."""
        try:
            scaler.unscale_(self._optimizer)
        except ValueError:
            return False
        except AssertionError:
            # "No inf checks were recorded": the optimizer holds nothing that got a gradient.
            return True
        return True

    def _update(self, scaler: Any, given: Any) -> None:
        plan = self._plan
        if plan.max_grad_norm is not None:
            with_gradients = [p for g in self._groups for p in g["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(with_gradients, plan.max_grad_norm)
        if scaler and any(p.grad is not None for g in self._groups for p in g["params"]):
            scaler.step(self._optimizer)
            scaler.update()
        else:
            take_step(self._optimizer, partial(loss_of, self._model, given, plan.loss_fn))
        if plan.scheduler is not None and not self._schedule_over:
            try:
                plan.scheduler.step()
            except (ValueError, TypeError):
                # It has no further step (OneCycleLR), or waits for what its run measures (ReduceLROnPlateau).
                self._schedule_over = True

    def facts(self, given: int) -> TrainingFacts:
        """Everything that was seen; ``given`` is the number of batches there are."""
        facts, found, plan = self._facts, self._found, self._plan
        used = max(1, len({step.batch for step in self._steps}))
        inputs = names_of(self._batches[:used])
        return TrainingFacts(
            model=facts,
            optimizer=self._described,
            optimizer_given=plan.optimizer is not None,
            schedule=self._schedule,
            max_grad_norm=plan.max_grad_norm,
            scaler=plan.scaler is not None and bool(plan.scaler.is_enabled()),
            custom_loss=plan.loss_fn is not None,
            steps=tuple(self._steps),
            tensors=self._watch.facts(),
            untouched=self._passed.without(found.lora) if self._steps else (),
            labels=self._labels,
            batches=given,
            inputs=inputs,
            later_inputs=tuple(n for n in names_of(self._batches[used:]) if n not in inputs),
            without_graph=self._passed.at_most(Ran.WITHOUT_GRAPH),
            cut=self._passed.at_most(Ran.CUT),
            media=tuple(medium_facts(self._batches, found.root)),
            history=tuple(float(loss) for loss in plan.history),
            changes=(*self._snapshot, *since_probe(found, self._keeper)),
            dropouts=tuple(live_dropouts(found)),
            repacked=tuple(repacked_layers(found)),
            updates=self._updates.facts(ranks=plan.ranks) if self._updates and self._steps else (),
            failure=self._failure,
            spoiled=tuple(spoiled_inputs(self._batches)),
            shift=self._beside.shift,
            taught=self._beside.taught,
            whole_targets=self._whole,
            empty_rows=tuple(empty_rows(self._batches, found.modules, facts.base, pad_token(found.root))),
            optimizer_is_fresh=self._is_fresh,
            references=self._passed.references(facts.active),
            answers=tuple(answer_facts(self._batches)),
            rows=row_count(self._batches),
            blank=tuple(blank_inputs(self._batches[:used])),
            padding=self._beside.padding,
            odd=tuple(odd_masks(self._batches[:used])),
            spread=tuple(self._beside.spread),
            at_itself=bool(self._passed.without_gradient.intersection(facts.active)),
            switched_off=self._passed.switched_off and not any(layer.disabled for layer in facts.layers),
            thinned=facts.base_dropouts if self._passed.thinned else (),
        )
