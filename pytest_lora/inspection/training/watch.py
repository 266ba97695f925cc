"""Steps that are watched: gradients and moves of each trainable tensor, and the first steps of somebody else's run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.optimizer import Part
from pytest_lora.facts.steps import StepFacts, TensorFacts
from pytest_lora.facts.training import Objective, TrainingFacts
from pytest_lora.inspection.base import dtype_name
from pytest_lora.inspection.model import adapted_survey, model_facts
from pytest_lora.inspection.placement import gathered
from pytest_lora.inspection.training.circumstances import repacked_layers
from pytest_lora.inspection.training.optimizer import (
    Owned,
    as_float,
    group_numbers,
    optimizer_facts,
    param_groups,
    parameter_parts,
    part_of,
    schedule_facts,
)

_SHORT = (torch.bfloat16, torch.float16)
"""Dtypes that lose a usual step in rounding; others are not compared number by number."""


def _dense(tensor: Tensor) -> Tensor:
    """The numbers of a tensor: of one spread over ranks all, of the gradient of a sparse embedding those it has."""
    tensor = gathered(tensor).detach()
    return tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor


def norms(tensors: Iterable[Tensor]) -> list[float]:
    """L2 norm of each tensor, in float32, with one transfer a device."""
    found = [torch.linalg.vector_norm(_dense(t).float()) for t in tensors]
    home = torch.device("cpu")
    by_device: dict[torch.device, list[int]] = {}
    for index, norm in enumerate(found):
        by_device.setdefault(norm.device, []).append(index)
    values = [0.0] * len(found)
    for indices in by_device.values():
        stacked = torch.stack([found[i] for i in indices]).to(home).tolist()
        for index, value in zip(indices, stacked, strict=True):
            values[index] = value
    return values


class Watch:
    """Notes, step by step, what gradient reaches each tensor and how far it moves."""

    def __init__(self, model: nn.Module, owned: dict[int, Owned], held: Mapping[int, int]) -> None:
        self._owned = owned
        self._held = held
        self._tensors = {
            name: p
            for name, p in model.named_parameters()
            if (p.requires_grad or id(p) in owned) and p.device.type != "meta"
        }
        self._trainable = {name: p for name, p in self._tensors.items() if p.requires_grad}
        self._start = dict(zip(self._tensors, norms(self._tensors.values()), strict=True))
        self._last = {name: p.detach().clone() for name, p in self._trainable.items()}
        self._gradients: dict[str, list[float | None]] = {name: [] for name in self._tensors}
        self._moves: dict[str, list[float]] = {name: [] for name in self._tensors}
        self._stayed: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[int, int]] = {}

    def note_gradients(self) -> float | None:
        """Note the gradients as they are now; their norm together, or None where there are none."""
        reached = {name: p.grad for name, p in self._tensors.items() if p.grad is not None}
        found = dict(zip(reached, norms(reached.values()), strict=True))
        for name, noted in self._gradients.items():
            noted.append(found.get(name))
        return math.sqrt(sum(g * g for g in found.values())) if found else None

    def note_rows(self, batch: Any) -> None:
        """Note, where a hook of the user's own sees the gradient of a table of tokens, which rows it leaves at zero."""
        hooked = {
            name: p.grad
            for name, p in self._trainable.items()
            if (p._backward_hooks or p._post_accumulate_grad_hooks) and p.ndim == 2 and type(p.grad) is Tensor
        }
        ids = batch.get("input_ids") if hooked and isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
            return
        mask = batch.get("attention_mask")
        fits = isinstance(mask, Tensor) and mask.shape == ids.shape
        tokens = sorted(set((ids[mask.bool()] if fits else ids).flatten().tolist()))
        for name, gradient in hooked.items():
            if gradient.layout is torch.strided and tokens and len(gradient) > tokens[-1]:
                self._rows[name] = int((gradient[tokens] == 0).all(1).sum()), len(tokens)

    def note_moves(self) -> None:
        """Note how far each tensor is from where it was the last time."""
        moved = dict(
            zip(
                self._trainable,
                norms(p.detach().float() - self._last[n].float() for n, p in self._trainable.items()),
                strict=True,
            )
        )
        for name, p in self._trainable.items():
            self._moves[name].append(moved[name] / math.sqrt(max(1, p.numel())))
            if p.dtype in _SHORT:
                self._stayed[name] = (p.detach() == self._last[name]).float().mean()
            self._last[name].copy_(p.detach())

    def facts(self) -> tuple[TensorFacts, ...]:
        """What was noted."""
        return tuple(self._facts(name, p) for name, p in self._tensors.items())

    def _facts(self, name: str, p: nn.Parameter) -> TensorFacts:
        owner = self._owned.get(id(p))
        part: Part = part_of(name, p, self._owned)
        return TensorFacts(
            name=name,
            module=owner.module if owner else name.rpartition(".")[0],
            adapter=owner.adapter if owner else "",
            part=part,
            dtype=dtype_name(p.dtype),
            numbers=p.numel(),
            trainable=name in self._trainable,
            held=id(p) in self._held,
            group=self._held.get(id(p)),
            finite=math.isfinite(self._start[name]),
            scale=self._start[name] / math.sqrt(max(1, p.numel())),
            gradients=tuple(self._gradients[name]),
            moves=tuple(self._moves[name]),
            stayed=float(self._stayed.get(name, 0.0)),
            held_rows=self._rows.get(name, (0, 0))[0],
            token_rows=self._rows.get(name, (0, 0))[1],
        )


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
        self._watch = Watch(model, parameter_parts(found), group_numbers(param_groups(optimizer)))
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
