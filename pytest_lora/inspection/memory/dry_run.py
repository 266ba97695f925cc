"""Runs forward and backward of one micro-batch on the meta device and records every storage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Evaluation
from pytest_lora.inspection.memory.batches import batch_for
from pytest_lora.inspection.memory.cuda_kernels import cuda_kernels
from pytest_lora.inspection.memory.fused_losses import fused_kernels
from pytest_lora.inspection.memory.layer_stacks import KEPT, LAST_INNER
from pytest_lora.inspection.memory.meta_answers import StandIns, swapped
from pytest_lora.inspection.memory.meta_model import MetaModel
from pytest_lora.inspection.memory.parallel import autocasts
from pytest_lora.inspection.memory.parallel.model import local
from pytest_lora.inspection.memory.patience import TooLongError
from pytest_lora.inspection.memory.remedies import remedy
from pytest_lora.inspection.memory.storage_tracker import (
    OUTSIDE,
    NeedsValuesError,
    StorageTracker,
    quiet,
)
from pytest_lora.inspection.memory.trainer_steps import prediction_step, smoothed_loss
from pytest_lora.inspection.memory.trainers import trl_loss
from pytest_lora.inspection.quiet import collector
from pytest_lora.inspection.transformers_internals import masks_without_values

EVALUATION = "evaluation"
"""The phase of an evaluation."""


class NotTracedError(ValueError):
    """A step does something that cannot be done without values, or not at all."""


@dataclass(frozen=True)
class Trace:
    """Storages of one micro-batch, in order; see ``StorageTracker`` for the lists.

    Attributes:
        events, units, phases: By event; unit ``KEPT * n + i`` is unit ``i`` of the model's stack ``n``.
        sizes, categories, operations, streams: By storage.
        flops: Unit, phase and floating-point operations of what computes, in order.
    """

    events: list[int]
    units: list[int]
    phases: list[str]
    sizes: list[int]
    categories: list[str]
    operations: list[str]
    streams: list[int]
    flops: list[tuple[int, str, int]]


def evaluated(built: MetaModel, setting: StepSetting, evaluation: Evaluation) -> Trace:
    """Record an evaluation, up to its last batch.

    Raises:
        ValueError: As ``trace``.
    """
    setting = replace(
        setting, batch_size=evaluation.batch_size, seq_len=evaluation.seq_len or setting.seq_len
    )
    built.model.eval()
    try:
        return trace(built, setting, evaluation=evaluation)
    finally:
        built.model.train()


def trace(
    built: MetaModel,
    setting: StepSetting,
    *,
    gradients_held: bool = False,
    evaluation: Evaluation | None = None,
) -> Trace:
    """Record one micro-batch; the model's gradients are dropped again.

    Args:
        built: The model.
        setting: Batch size, sequence length, mask, and whether outputs are held.
        gradients_held: Whether the micro-batch adds to gradients of another one.
        evaluation: What is recorded in its place: an evaluation.

    Raises:
        ValueError: The model does something that needs values; the message names it.
    """
    if built.rank is not None and built.rank.first_differs:
        built.rank.first_differs = False
        trace(built, setting)
    model = built.model if built.rank is None else built.rank.called
    trainable = [p for p in model.parameters() if p.requires_grad]
    tracker = _tracker(built, setting)
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.ignore(local(tensor))
    if gradients_held:
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
            tracker.ignore(local(parameter.grad))
    try:
        with _recorded(built, model, setting, tracker):
            if evaluation is not None:
                tracker.phase = EVALUATION
                _evaluate(built, model, setting, evaluation)
            else:
                _step(built, model, setting, tracker)
            for gradient in built.rank.gradients() if built.rank else ():
                tracker.recategorize(gradient, "gradients")
    except TooLongError:
        raise
    except Exception as error:
        raise _not_traced(error, built, setting) from error
    finally:
        tracker.recording = False
    for parameter in trainable:
        parameter.grad = None
    return Trace(
        tracker.events,
        tracker.units,
        tracker.phases,
        tracker.sizes,
        tracker.categories,
        tracker.operations,
        tracker.streams,
        tracker.flops,
    )


def _tracker(built: MetaModel, setting: StepSetting) -> StorageTracker:
    config = _text_config(built.transformer)
    stand_ins = StandIns(
        padded=setting.padding_mask,
        experts=_first_of(config, _EXPERTS),
        images=setting.images,
        logs=setting.by_trl,
    )
    return StorageTracker(_first_of(config, ("vocab_size",)), stand_ins)


@contextmanager
def _recorded(
    built: MetaModel, called: nn.Module, setting: StepSetting, tracker: StorageTracker
) -> Iterator[None]:
    """Record what runs within, with the kernels of CUDA and what libraries do around a step."""
    rank = built.rank
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_following(built, tracker))
        if rank is None or rank.notices_gradients:
            enter(_gradients_noticed([p for p in called.parameters() if p.requires_grad], tracker))
        if rank is not None:
            enter(rank.around(tracker))
        enter(quiet())
        enter(collector.paused())
        enter(masks_without_values())
        enter(without_marks())
        autocast = getattr(torch, setting.autocast) if autocasts(setting) else None
        enter(cuda_kernels(autocast, setting.attention, tracker.count))
        if setting.by_trl:
            enter(fused_kernels(tracker.count))
        if setting.by_accelerate:
            enter(outputs_in_float32(called))
        enter(tracker.recorded())
        yield


def _not_traced(error: Exception, built: MetaModel, setting: StepSetting) -> NotTracedError:
    kind = "" if isinstance(error, NeedsValuesError) else f"{type(error).__name__}: "
    return NotTracedError(
        f"base: a step of {type(built.transformer).__name__} cannot be traced: {kind}{error}"
        f"{remedy(error, built.transformer)}; asked: batch_size={setting.batch_size}, seq_len={setting.seq_len}, "
        f"images={setting.images}, image_size={setting.image_size}"
    )


def _step(built: MetaModel, called: nn.Module, setting: StepSetting, tracker: StorageTracker) -> None:
    held: list[Any] = []
    loss: Any
    if setting.by_trl:
        loss = trl_loss(called, setting)
    elif setting.args:
        loss = smoothed_loss(called, setting, batch_for(built.transformer, setting))
    else:
        outputs: Any = called(**batch_for(built.transformer, setting))
        loss = outputs["loss"] if "loss" in outputs else outputs[0].float().mean()
        if setting.outputs_held:
            held.append(outputs)
        tracker.unit = OUTSIDE  # what every layer has handed out goes with the outputs
        del outputs
    tracker.unit = OUTSIDE
    tracker.phase = "backward"
    loss.backward()
    tracker.unit = OUTSIDE


def _evaluate(built: MetaModel, called: nn.Module, setting: StepSetting, evaluation: Evaluation) -> None:
    """The first batch and the last one, to which all between have been added; then all of it is let go.

    Batches are joined where they are kept: beside the old ones and the new one stand all of them together
    (``EvalLoopContainer`` of transformers).
    """
    container: Any = importlib.import_module("transformers.trainer_pt_utils").EvalLoopContainer
    kept = [container(), container()]
    batches = evaluation.batches or 1
    for earlier in (0, batches - 1)[: min(batches, 2)]:
        batch = None if setting.by_trl else batch_for(built.transformer, setting)
        loss, *found = prediction_step(called, built.transformer, setting, batch, evaluation.keeps)
        for container, new in zip(kept, found, strict=True):
            if new is not None:
                if earlier:
                    container.tensors = tree_map_only(torch.Tensor, _times(earlier), container.tensors)
                container.add(new)
        del loss, found, new, batch


def _times(batches: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def repeated(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(batches * tensor.shape[0], *tensor.shape[1:]) if tensor.dim() else tensor

    return repeated


@contextmanager
def without_marks() -> Iterator[None]:
    """Ranges for torch's profiler, which FSDP marks everywhere, are operations too: a third of its trace."""
    marks: Any = importlib.import_module("torch.autograd.profiler").record_function
    with swapped([(marks, "__enter__", lambda self: self), (marks, "__exit__", lambda *_: None)]):
        yield


@contextmanager
def outputs_in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model's call hand on its outputs as accelerate prepares it to under autocast."""
    convert: Any = importlib.import_module("accelerate.utils").convert_outputs_to_fp32
    with swapped([(model, "forward", convert(model.forward))]):
        yield


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _text_config(transformer: nn.Module) -> Any:
    config: Any = getattr(transformer, "config", None)
    return getattr(config, "text_config", config)


def _first_of(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


@contextmanager
def _gradients_noticed(trainable: list[nn.Parameter], tracker: StorageTracker) -> Iterator[None]:
    def notice(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            tracker.recategorize(parameter.grad, "gradients")

    parameters: list[Any] = list(trainable)
    handles = [p.register_post_accumulate_grad_hook(notice) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _following(built: MetaModel, tracker: StorageTracker) -> Iterator[None]:
    """Tell the tracker which unit runs: by the layers' calls, and by the gradients of their outputs.

    Before what else is hooked to them, which gathers parameters.
    """
    handles = []
    for stack in built.stacks if built.rank is None else built.rank.stacks:
        if not stack.units[-1]:  # what follows is no part of the unit that stands for others
            last = stack.units[LAST_INNER][-1]
            handles.append(last.register_forward_hook(tracker.leave, prepend=True))
        for i, layers in enumerate(stack.units):
            for layer in layers:
                enter = _entering(tracker, KEPT * stack.number + i)
                handles.append(layer.register_forward_pre_hook(enter, prepend=True))
                handles.append(layer.register_forward_hook(enter, prepend=True))
    # A step may run the model several times; what is between its layers belongs to none.
    handles.append(built.transformer.register_forward_pre_hook(_entering(tracker, OUTSIDE), prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(tracker: StorageTracker, unit: int) -> Callable[..., None]:
    def on_gradient(_: torch.Tensor) -> None:
        tracker.unit = unit

    def hook(module: nn.Module, *values: Any) -> None:
        tracker.unit = unit
        if len(values) > 1:  # after the call: inputs and outputs
            outputs = values[-1]
            first: Any = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            if getattr(first, "requires_grad", False):
                first.register_hook(on_gradient)

    return hook
