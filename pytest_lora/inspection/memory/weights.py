"""What is on the device once a model is loaded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from pytest_lora.inspection.bitsandbytes_internals import quantization_statistics
from pytest_lora.inspection.memory.layer_stacks import KEPT, Stack
from pytest_lora.inspection.memory.packed_weights import STATISTICS
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE


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
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(base, name)()
        except (AttributeError, NotImplementedError):
            continue
        found |= {id(p) for p in module.parameters()} if module is not None else set()
    return found
