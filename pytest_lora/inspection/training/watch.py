"""Each trainable tensor over some steps: gradients and moves."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pytest_lora.facts.optimizer import Part
from pytest_lora.facts.steps import TensorFacts
from pytest_lora.inspection.base import dtype_name
from pytest_lora.inspection.placement import gathered
from pytest_lora.inspection.training.optimizer import Owned, part_of

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

    def __init__(self, model: nn.Module, owned: dict[int, Owned], held: set[int]) -> None:
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

    def note_gradients(self) -> float | None:
        """Note the gradients as they are now; their norm together, or None where there are none."""
        reached = {name: p.grad for name, p in self._tensors.items() if p.grad is not None}
        found = dict(zip(reached, norms(reached.values()), strict=True))
        for name, noted in self._gradients.items():
            noted.append(found.get(name))
        return math.sqrt(sum(g * g for g in found.values())) if found else None

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
            finite=math.isfinite(self._start[name]),
            scale=self._start[name] / math.sqrt(max(1, p.numel())),
            gradients=tuple(self._gradients[name]),
            moves=tuple(self._moves[name]),
            stayed=float(self._stayed.get(name, 0.0)),
        )
