"""How many numbers a model holds: logical, trainable, and as they are stored."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from pytest_lora.inspection.base import BaseParameter


class Totals(NamedTuple):
    """Numbers in a model.

    Attributes:
        trainable: Logical numbers that require gradients.
        total: Logical numbers, adapters included.
        base: Logical numbers of the base alone.
        stored: What ``sum(p.numel() for p in model.parameters())`` gives; packed 4-bit bytes count once.
        stored_bytes: Bytes of all parameters as they are stored.
    """

    trainable: int
    total: int
    base: int
    stored: int
    stored_bytes: int


def count(model: nn.Module, base: tuple[BaseParameter, ...]) -> Totals:
    """Count a model whose base parameters are known; tied parameters count once."""
    logical = {id(p.tensor): p.numbers for p in base}
    trainable = total = stored = stored_bytes = 0
    for parameter in model.parameters():
        numbers = parameter.numel()
        stored += numbers
        stored_bytes += numbers * parameter.element_size()
        numbers = logical.get(id(parameter), numbers)
        total += numbers
        trainable += numbers if parameter.requires_grad else 0
    return Totals(trainable, total, sum(p.numbers for p in base), stored, stored_bytes)
