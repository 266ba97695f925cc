"""Some real optimizer steps on a model, watched, as facts; everything is put back afterwards."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.batch_law import AloneFacts
from pytest_lora.facts.model import LayerState
from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.facts.training import Failure, LossDrop, Phase, StepFacts, TrainingFacts, unusual_inits
from pytest_lora.inspection.behaviour.batch_law import batch_law
from pytest_lora.inspection.model import adapted_survey, model_facts
from pytest_lora.inspection.peft_internals import LoraLayer
from pytest_lora.inspection.survey import Survey
from pytest_lora.inspection.training.base_changes import since_probe, since_snapshot
from pytest_lora.inspection.training.batches import LossFn, NoLossError, generators_of, loss_of, take_batches
from pytest_lora.inspection.training.failures import failure_of
from pytest_lora.inspection.training.graph import Ran, how_it_runs
from pytest_lora.inspection.training.labels import label_facts, vocabulary
from pytest_lora.inspection.training.media import medium_facts
from pytest_lora.inspection.training.optimizer import (
    as_float,
    optimizer_facts,
    param_groups,
    parameter_parts,
    schedule_facts,
)
from pytest_lora.inspection.training.trace import Trace, cuda_in_use, traceless
from pytest_lora.inspection.training.updates import Updates
from pytest_lora.inspection.training.watch import Watch


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train, as the user gave it.

    Attributes:
        steps: Optimizer steps; 0 looks at labels and modes only.
        rate: Learning rate of the AdamW that is made where ``optimizer`` is None; None chooses one.
        optimizer: The user's optimizer.
        scheduler: Stepped once after each step.
        max_grad_norm: Where gradients are clipped.
        scaler: A GradScaler.
        history: Losses so far.
        base_snapshot: Tensors of the base before training, by name.
        loss_fn: Makes the loss; by default the model does.
        ranks: Measure the rank of what the steps did to each adapted weight.
        tell_failures: Note what the model or the optimizer raises, where its cause is known, instead of passing it on.
    """

    steps: int
    rate: float | None
    optimizer: Any = None
    scheduler: Any = None
    max_grad_norm: float | None = None
    scaler: Any = None
    history: Sequence[float] = ()
    base_snapshot: Mapping[str, Tensor] | None = None
    loss_fn: LossFn | None = None
    ranks: bool = False
    tell_failures: bool = False

    @property
    def kept(self) -> tuple[object, ...]:
        """What has a state of its own."""
        return self.optimizer, self.scheduler, self.scaler


def training_facts(model: nn.Module, batches: Any, plan: Plan) -> TrainingFacts:
    """Take some real steps and say what was seen; the model and all that trains it are left as they were.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or ``batches`` has another form.
        ValueError: There is no batch, or the model gives no loss for one.
    """
    with traceless(model, plan.kept, generators_of(batches)) as trace:
        taken = take_batches(batches, plan.steps, plan.loss_fn)
        given = (
            len(batches) if isinstance(batches, Sized) and not isinstance(batches, Mapping) else len(taken)
        )
        probe = _Probe(model, taken, plan, trace)
        probe.run()
        facts = probe.facts(given)
        # Last of all, as the model may keep something of it: positions, counters, caches.
        return replace(facts, alone=probe.batch_law()) if facts.steps else facts


def loss_drop(
    model: nn.Module, batches: Any, plan: Plan, by: float, device: torch.device | None
) -> tuple[TrainingFacts, LossDrop]:
    """Train on some batches, and compare their mean loss, dropout off, before and after.

    Args:
        model: The model.
        batches: One batch or an iterable of batches; of a list no more than ``plan.steps`` are used.
        plan: How to train; a ``rate`` of None chooses one that suits the adapters.
        by: Relative drop that is asked for.
        device: Where to run, or None for where the model is.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or ``batches`` has another form.
        ValueError: There is no batch, or the model gives no loss for one.
    """
    if device is not None and device.type == "cuda":
        # Started only now, CUDA would begin with a random state that was never noted.
        cuda: Any = torch.cuda
        cuda.init()
    with traceless(model, plan.kept, generators_of(batches)) as trace:
        taken = take_batches(batches, plan.steps, plan.loss_fn)[: plan.steps]
        if device is not None:
            model.to(device)
        probe = _Probe(model, taken, plan, trace)
        mean_loss = _evaluation(model, taken, plan.loss_fn)
        before = mean_loss() if probe.runnable else float("nan")
        probe.run()
        after = mean_loss() if probe.runnable else float("nan")
        facts = probe.facts(len(taken))
    return facts, LossDrop(
        before=before,
        after=after,
        curve=tuple(step.loss for step in facts.steps),
        lr=None if plan.optimizer is not None else probe.rate,
        by=by,
        adapter_learned=facts.adapter_learned,
    )


def _evaluation(model: nn.Module, batches: tuple[Any, ...], loss_fn: LossFn | None) -> Callable[[], float]:
    """The mean loss of fixed batches, in evaluation mode and from the same random state at every call."""
    devices = range(torch.cuda.device_count()) if cuda_in_use() else range(0)
    seed = torch.initial_seed() % 2**63

    def mean_loss() -> float:
        modes = [(module, module.training) for module in model.modules()]
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            for module, _ in modes:
                module.training = False
            try:
                return sum(float(loss_of(model, batch, loss_fn)) for batch in batches) / len(batches)
            finally:
                for module, training in modes:
                    module.training = training

    return mean_loss


class _StepError(Exception):
    """A step raised, for a reason that is known."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class _Probe:
    """Some steps on a model and what is seen on the way."""

    def __init__(self, model: nn.Module, batches: tuple[Any, ...], plan: Plan, trace: Trace) -> None:
        self._model = model
        self._batches = batches
        self._plan = plan
        self._trace = trace
        self._found = adapted_survey(model)
        self._facts = model_facts(model)
        self._labels = tuple(label_facts(batches, vocabulary(self._found.root, self._facts.base)))
        self._snapshot = tuple(since_snapshot(model, self._found, plan.base_snapshot or {}))
        self.rate = suitable_rate(self._facts.active_layers) if plan.rate is None else plan.rate
        self._optimizer: Any = plan.optimizer or _default_optimizer(model, self.rate)
        self._described = (
            optimizer_facts(model, self._optimizer)
            if self._optimizer
            else OptimizerFacts("AdamW", (), (), 0, 0, ())
        )
        self._schedule = schedule_facts(plan.scheduler, self._optimizer) if plan.scheduler else None
        self._touched: dict[str, Ran] = {}
        held = {id(p) for group in self._groups for p in group["params"]}
        self._watch = Watch(model, parameter_parts(self._found), held)
        self._steps: list[StepFacts] = []
        self._failure: Failure | None = None
        self._schedule_over = False
        measured = plan.ranks or bool(unusual_inits(self._facts))
        self._updates = Updates(self._found, trace) if measured and plan.steps else None

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
        for name, layer in self._found.lora.items():
            module: Any = layer
            module.register_forward_pre_hook(self._toucher(name))
        for index in range(self._plan.steps):
            batch = index % len(self._batches)
            try:
                if not self._step(index + 1, batch):
                    break
            except _StepError as failed:
                self._failure = failed.failure
                break

    def batch_law(self) -> AloneFacts | None:
        """A text alone against the same text in its batch, where the model itself makes the loss."""
        if self._plan.loss_fn is not None or self._failure is not None:
            return None
        return batch_law(self._model, self._found.root, self._batches[: len(self._steps)])

    def _toucher(self, name: str) -> Callable[[nn.Module, Any], None]:
        def note(_: nn.Module, arguments: Any) -> None:
            first = arguments[0] if arguments else None
            if not isinstance(first, Tensor) or first.numel():
                self._touched[name] = max(self._touched.get(name, Ran.CUT), how_it_runs())

        return note

    def _step(self, number: int, batch: int) -> bool:
        """Take one step; False if no further one can be taken."""
        plan = self._plan
        told = partial(self._told, number=number, batch=batch)
        scaler = plan.scaler if plan.scaler is not None and plan.scaler.is_enabled() else None
        for p in self._model.parameters():
            p.grad = None
        for group in self._groups:
            for p in group["params"]:
                p.grad = None
        with told("forward pass"):
            loss = loss_of(self._model, self._batches[batch], plan.loss_fn)
        has_graph = loss.requires_grad
        if has_graph:
            with told("backward pass"):
                (scaler.scale(loss) if scaler else loss).backward()
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
        if has_graph and unscaled and self._optimizer:
            with told("optimizer step"):
                self._update(scaler)
        self._watch.note_moves()
        return unscaled

    @contextmanager
    def _told(self, phase: Phase, *, number: int, batch: int) -> Iterator[None]:
        """Note an error that tells what is wrong with the set-up; others, and those of the user's loss, go on."""
        try:
            yield
        except NoLossError:
            raise
        except Exception as error:
            if self._plan.loss_fn is not None or not self._plan.tell_failures:
                raise
            given = self._batches[batch]
            failure = failure_of(error, phase, self._found.root, given, step=number, index=batch)
            if failure is None:
                raise
            raise _StepError(failure) from error

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

    def _update(self, scaler: Any) -> None:
        plan = self._plan
        if plan.max_grad_norm is not None:
            with_gradients = [p for g in self._groups for p in g["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(with_gradients, plan.max_grad_norm)
        if scaler and any(p.grad is not None for g in self._groups for p in g["params"]):
            scaler.step(self._optimizer)
            scaler.update()
        else:
            self._optimizer.step()
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
        inputs = _names(self._batches[:used])
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
            untouched=tuple(n for n in found.lora if n not in self._touched) if self._steps else (),
            labels=self._labels,
            batches=given,
            inputs=inputs,
            later_inputs=tuple(n for n in _names(self._batches[used:]) if n not in inputs),
            without_graph=tuple(n for n, ran in self._touched.items() if ran < Ran.WITH_GRAPH),
            cut=tuple(n for n, ran in self._touched.items() if ran == Ran.CUT),
            history=tuple(float(loss) for loss in plan.history),
            changes=(*self._snapshot, *since_probe(found, self._trace)),
            dropouts=tuple(_live_dropouts(found)),
            lora_dropout=max((layer.dropout for layer in facts.active_layers), default=0.0),
            repacked=tuple(repacked(found)),
            updates=self._updates.facts(ranks=plan.ranks) if self._updates and self._steps else (),
            failure=self._failure,
            spoiled=tuple(_spoiled(self._batches)),
            media=tuple(medium_facts(self._batches, found.root)),
        )


def _names(batches: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of what some batches hold, each once."""
    return tuple(dict.fromkeys(str(n) for batch in batches if isinstance(batch, Mapping) for n in batch))


def _default_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer | None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=rate) if trainable else None


def suitable_rate(layers: Sequence[LayerState]) -> float:
    """A learning rate for Adam at which some twenty steps move adapters far enough and not too far.

    A step of size ``lr`` in every number of ``lora_B`` changes the output of a module by about
    ``lr * scaling * sqrt(rank / 3)`` of the size of its input, whatever its width, and the changes of all modules add
    up. This is kept at what ``RATE`` gives ten modules of rank 8 and scaling 2; a 7B model with rank 16 on all its
    linear layers gets 3e-4.
    """
    strength = max((abs(layer.scaling) * math.sqrt(layer.rank) for layer in layers), default=0.0)
    if not strength:
        return RATE
    rate = RATE * (2 * math.sqrt(8) / strength) * (10 / max(1, len(layers)))
    return min(max(rate, RATE / 100), 3 * RATE if strength < 1 else RATE)


RATE = 1e-2
"""Measured on tiny Llama, GPT-2, T5, BERT and the built-in base, ranks 1 to 64: of 1e-3, 3e-3, 1e-2 and 3e-2 the one
whose smallest drop in 20 steps is the largest (3 %)."""


def _spoiled(batches: tuple[Any, ...]) -> Iterator[str]:
    """Inputs that are not finite. An additive mask is infinite on purpose."""
    for index, batch in enumerate(batches):
        for name, value in batch.items() if isinstance(batch, Mapping) else ():
            known = isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "meta"
            if known and not re.search(r"mask|bias|label", str(name)) and not bool(value.isfinite().all()):
                yield f"batch {index}: {name}"


def _live_dropouts(found: Survey) -> Iterator[str]:
    for name, module in found.modules.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            yield name
    for name, layer in found.lora.items():
        yield from (f"{name}.lora_dropout" for _ in range(_drops(layer)))


def _drops(layer: LoraLayer) -> bool:
    active = layer.active_adapters
    dropouts = (layer.lora_dropout[a] for a in active if a in layer.lora_dropout)
    return any(d.training and getattr(d, "p", 0) > 0 for d in dropouts)


def repacked(found: Survey) -> Iterator[str]:
    """4-bit layers whose weight is in the packing for inference on a CPU."""
    for name, module in found.modules.items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            yield name
