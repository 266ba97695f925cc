"""What one rank holds of a model, and what it calls to train it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pytest_lora.inspection.base import embeddings_of
from pytest_lora.inspection.bitsandbytes_internals import quantization_statistics
from pytest_lora.inspection.memory.layer_stacks import KEPT, Stack
from pytest_lora.inspection.memory.packed_weights import STATISTICS
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE, StorageTracker

if TYPE_CHECKING:
    from pytest_lora.inspection.memory.meta_model import MetaModel
    from pytest_lora.inspection.memory.parallel.placed import Placement

CUT = ("parameter shards", "adapters")
"""Categories of what is divided."""


class Weight(NamedTuple):
    """A storage of a loaded model: its bytes, what it holds, and the unit of a cut stack that it is in."""

    size: int
    category: str
    unit: int


class Trained(NamedTuple):
    """What an optimizer is given: its shape, its dtype, and the unit of a cut stack that it is in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: int

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def units_of(stacks: list[Stack]) -> dict[int, int]:
    """The unit of every parameter and buffer inside cut stacks, by identity."""
    return {
        id(tensor): KEPT * stack.number + i
        for stack in stacks
        for i, layers in enumerate(stack.units)
        for layer in layers
        for tensor in (*layer.parameters(), *layer.buffers())
    }


def loaded_weights(model: nn.Module, unit_of: dict[int, int]) -> list[Weight]:
    """Every storage of a model with adapters, before it has run: bitsandbytes moves some in the first forward."""
    wrapper: Any = model
    embeddings = _embeddings(wrapper.get_base_model())
    seen: set[int] = set()
    found: list[Weight] = []
    for tensor in (*model.parameters(), *model.buffers()):
        unit = unit_of.get(id(tensor), OUTSIDE)
        statistics = getattr(tensor, STATISTICS, None) or quantization_statistics(tensor)
        category = _category(tensor, id(tensor) in embeddings, bool(statistics))
        for part, kind in ((tensor, category), *((s, "quantization statistics") for s in statistics)):
            storage = part.untyped_storage()
            if part.is_meta and id(storage) not in seen and storage.nbytes():
                seen.add(id(storage))
                found.append(Weight(storage.nbytes(), kind, unit))
    return found


def _category(tensor: Any, embedding: bool, quantized: bool) -> str:
    if quantized:
        return "quantized base weights"
    if tensor.requires_grad:
        return "adapters"
    return "embeddings and head" if embedding else "base weights"


def _embeddings(base: Any) -> set[int]:
    found: set[int] = set()
    for module in (embeddings_of(base, "input"), embeddings_of(base, "output")):
        found |= {id(p) for p in module.parameters()} if module is not None else set()
    return found


def _nothing() -> list[torch.Tensor]:
    return []


def nothing_around(tracker: StorageTracker) -> AbstractContextManager[None]:
    """What a step runs within that is shared without anything of its own."""
    return nullcontext()


@dataclass(frozen=True)
class Loading:
    """Storages that are made and freed until a model is cut; what is left are its parts.

    Attributes:
        events, units: As in a trace.
        sizes: Bytes by storage.
        later: Categories of weights that are made afterwards.
        emptied: Whether the cache is emptied afterwards.
    """

    events: list[int]
    units: list[int]
    sizes: list[int]
    later: tuple[str, ...] = ()
    emptied: bool = False


@dataclass
class Rank:
    """A model as one rank has it.

    Attributes:
        called: What a step calls.
        trained: What the optimizer holds the state of on the device.
        weights: What is on the device once it is loaded.
        stacks: The repeated layers, by the modules that gather and free their parameters.
        around: What a step runs within, given what follows its storages.
        gradients: The gradients after a step.
        notices_gradients: Whether the model's own parameters get the gradients, and keep them.
        by_formula: Parts that are computed, and not run.
        placement: Where layers lie on several GPUs, on which; the figures are then those of the fullest.
        first_differs: Whether the next step is the first one, and not like those after it.
        loading: What is made on the way to the parts among ``weights``; None where that leaves nothing in the cache.
        apart: Bytes that are reserved beside what is allocated, for a stream that is followed apart.
    """

    called: nn.Module
    trained: list[Trained]
    weights: list[Weight]
    stacks: list[Stack]
    around: Callable[[StorageTracker], AbstractContextManager[None]]
    gradients: Callable[[], list[torch.Tensor]] = field(default=_nothing)
    by_formula: tuple[str, ...] = ()
    notices_gradients: bool = False
    placement: Placement | None = None
    first_differs: bool = False
    loading: Loading | None = None
    apart: int = 0


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a distributed tensor; the tensor itself where it is whole."""
    part: Any = getattr(tensor, "_local_tensor", tensor)
    found: torch.Tensor = part
    return found


def offloaded(weights: list[Weight], trained: list[Trained]) -> tuple[list[Weight], list[Trained]]:
    """Weights and what is trained where parameters, gradients and optimizer lie in the host's memory.

    The part of the largest unit is on the device while it is gathered.
    """
    by_unit: dict[int, int] = {}
    for weight in weights:
        if weight.category in CUT:
            by_unit[weight.unit] = by_unit.get(weight.unit, 0) + weight.size
    kept = [weight for weight in weights if weight.category not in CUT]
    return [*kept, Weight(max(by_unit.values(), default=0), "gathered parameters", OUTSIDE)], []


OFFLOAD_FORMULA = (
    "parameters, gradients and optimizer in the host's memory; on the device the part that is gathered"
)


def shards(called: nn.Module, built: MetaModel, unit_of: dict[int, int]) -> list[Weight]:
    """The storages of a model whose parameters are divided; scales of packed weights are not."""
    found = [weight for weight in built.weights if weight.category == "quantization statistics"]
    for tensor, category in _named(called):
        size = local(tensor).untyped_storage().nbytes()
        if size:
            found.append(Weight(size, category, unit_of.get(id(tensor), OUTSIDE)))
    return found


def _named(called: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    seen: set[int] = set()
    for parameter in called.parameters():
        storage = id(local(parameter).untyped_storage())
        if storage not in seen:
            seen.add(storage)
            yield parameter, "adapters" if parameter.requires_grad else "parameter shards"
    yield from ((buffer, "base weights") for buffer in called.buffers() if buffer.is_meta)


def trained_shards(called: nn.Module, unit_of: dict[int, int]) -> list[Trained]:
    """What an optimizer gets of a divided model."""
    return [
        Trained(tuple(local(p).shape), p.dtype, unit_of.get(id(p), OUTSIDE))
        for p in called.parameters()
        if p.requires_grad and local(p).numel()
    ]


def gradients_of(called: nn.Module) -> list[torch.Tensor]:
    """The gradients that a divided model holds."""
    return [local(p.grad) for p in called.parameters() if p.grad is not None]
