"""ZeRO-3: what a step gathers, in the order of DeepSpeed's own coordinator, and DeepSpeed's linear layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from pytest_lora.inspection.memory.cuda_allocator import max_reserved, rounded
from pytest_lora.inspection.memory.meta_answers import swapped


class Limits(NamedTuple):
    """Numbers that ``zero_optimization`` sets.

    Attributes:
        ahead: That are gathered ahead, ``stage3_prefetch_bucket_size``.
        reuse: Within which a parameter that is used again stays, ``stage3_max_reuse_distance``.
        live: That are whole at once where something is gathered ahead, ``stage3_max_live_parameters``.
    """

    ahead: int
    reuse: int
    live: int


class Part(NamedTuple):
    """A parameter that is divided: its numbers, and the bytes of each."""

    numel: int
    width: int


class Gathered(NamedTuple):
    """Bytes that are whole at once at most, and that the allocator reserves for them."""

    allocated: int
    reserved: int


def gathered(units: list[list[list[Part]]], again: list[bool], limits: Limits) -> Gathered:
    """Two steps of a model as ``PartitionedParameterCoordinator`` runs them: one to learn the order, one ahead.

    What is freed is still read on the device (``record_stream``), and the host goes on: it waits for a gather only
    where two more are on their way (``__max_ongoing_fetch_events``), so that the allocator takes a block again as late
    as FSDP1's. Where the device is further behind, with long steps, more is reserved.

    Args:
        units: Layers and what is around them, in the order in which they run, with the parameters of each module.
        again: Whether a unit is checkpointed, and so runs forward again before it goes backward.
        limits: The configuration.
    """
    parts = [part for unit in units for module in unit for part in module]
    order = list(_order(units, again))
    step = _Coordinator(parts, order, limits)
    step.run(ahead=False)
    learned = len(step.events)
    step.run(ahead=True)
    sizes = np.array(step.sizes, dtype=np.int64)
    events = np.array(step.events, dtype=np.int64)
    if not len(events):
        return Gathered(0, 0)
    storages, frees = np.where(events < 0, ~events, events), events < 0
    level = np.cumsum(np.where(frees, -1, 1) * rounded(sizes)[storages])
    of_gathers = np.ones(len(sizes), dtype=np.int64)
    reserved = max_reserved(sizes, storages, storages, frees, streams=of_gathers, caught_up=learned)
    return Gathered(int(level.max()), reserved)


def _order(units: list[list[list[Part]]], again: list[bool]) -> Iterator[list[int]]:
    """The parameters of each module, by their number, as modules run forward and backward.

    The embeddings go backward where checkpoints let them require gradients (``enable_input_require_grads``).
    """
    numbered, first = [], 0
    for unit in units:
        modules = []
        for module in unit:
            modules.append(list(range(first, first + len(module))))
            first += len(module)
        numbered.append(modules)
        yield from modules
    embeddings = [] if any(again) or not numbered else numbered[0][:1]
    for modules, twice in zip(reversed(numbered), reversed(again), strict=True):
        if twice:
            yield from modules
        yield from (module for module in reversed(modules) if module not in embeddings)


@dataclass
class _Group:
    """Parameters that are gathered together, and the buffer of all ranks that they are copied out of."""

    members: list[int]
    buffer: int
    unused: set[int]
    copied: bool = False


@dataclass
class _Coordinator:
    parts: list[Part]
    order: list[list[int]]
    limits: Limits
    sizes: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    whole: dict[int, int] = field(default_factory=dict)
    """The storage of each parameter that is whole, or on its way alone."""
    coming: dict[int, _Group | None] = field(default_factory=dict)

    def run(self, *, ahead: bool) -> None:
        """One forward and backward (``fetch_sub_module``, ``release_sub_module``)."""
        queue = iter([(part, at) for at, module in enumerate(self.order) for part in module])
        last: dict[int, int] = defaultdict(lambda: -1)
        for at, module in enumerate(self.order):
            self._gather([part for part in module if not self._is_there(part)])
            for part in module:
                self._wait(part)
            if ahead:
                missed = sum(last[part] < at for part in module)
                for _, (part, used) in zip(range(missed), queue, strict=False):
                    last[part] = used
                self._gather_ahead(queue, last)
            kept = self._kept(at + 1, module) if ahead else set()
            for part in module:
                if part not in kept and last[part] <= at + 1:
                    self._free(self.whole.pop(part))
        for part in list(self.coming):
            self._wait(part)
        for part in list(self.whole):
            self._free(self.whole.pop(part))

    def _is_there(self, part: int) -> bool:
        return part in self.whole or part in self.coming

    def _gather_ahead(self, queue: Iterator[tuple[int, int]], last: dict[int, int]) -> None:
        room = self.limits.live - sum(self.parts[part].numel for part in {*self.whole, *self.coming})
        room = min(room, self.limits.ahead)
        chosen: dict[int, int] = {}
        while sum(chosen.values()) < room:
            part, used = next(queue, (-1, -1))
            if part < 0:
                break
            if not self._is_there(part):
                chosen[part] = self.parts[part].numel
            last[part] = max(last[part], used)
        self._gather(list(chosen))

    def _kept(self, at: int, module: list[int]) -> set[int]:
        """Those of a module that are used again within the reuse distance (``__params_to_release``)."""
        found: set[int] = set()
        traversed = 0
        for later in self.order[at:]:
            if traversed >= self.limits.reuse or len(found) == len(module):
                break
            found |= set(module) & set(later)
            traversed += sum(self.parts[part].numel for part in later)
        return found

    def _gather(self, chosen: list[int]) -> None:
        """One alone comes as it is (``all_gather_coalesced``)."""
        if len(chosen) == 1:
            self.whole[chosen[0]] = self._make(chosen)
            self.coming[chosen[0]] = None
        elif chosen:
            group = _Group(chosen, self._make(chosen), set(chosen))
            self.coming |= dict.fromkeys(chosen, group)

    def _wait(self, part: int) -> None:
        """The first that is needed has all copied; the buffer goes with the last (``AllGatherCoalescedHandle``)."""
        group = self.coming.pop(part, None)
        if group is None:
            return
        if not group.copied:
            group.copied = True
            self.whole |= {member: self._make([member]) for member in group.members}
        group.unused.discard(part)
        if not group.unused:
            self._free(group.buffer)

    def _make(self, chosen: list[int]) -> int:
        self.sizes.append(sum(self.parts[part].numel * self.parts[part].width for part in chosen))
        self.events.append(len(self.sizes) - 1)
        return self.events[-1]

    def _free(self, storage: int) -> None:
        self.events.append(~storage)


def zero3_linears() -> AbstractContextManager[None]:
    """Let every linear layer save its input, of a frozen weight too, which torch's own saves for a trained one alone.

    The same operations in the same order as ``LinearFunctionForZeroStage3`` (deepspeed/runtime/zero/linear.py, the same
    from 0.9 to 0.18). ``zero.Init`` puts it in where ``memory_efficient_linear`` is on, which is the default, and
    transformers and accelerate load a model within it; it stays to the end of the process.
    """
    return swapped([(functional, "linear", _Linear.apply)])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        ctx.save_for_backward(given, weight, bias)
        if given.dim() == 2 and bias is not None:
            return torch.addmm(bias, given, weight.t())
        output = given.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        given, weight, bias = ctx.saved_tensors
        (gradient,) = gradients
        of_input = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_weight = rows.t().matmul(given.reshape(-1, given.shape[-1])) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return of_input, of_weight, of_bias
