"""What the numbers of a base show: whether they are finite, and whether whole parts were never loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import distributed

from pytest_lora.inspection.base import BaseParameter
from pytest_lora.inspection.bitsandbytes_internals import quantization_statistics
from pytest_lora.inspection.layers import CPU_NUMBERS, UNREAD, Values, read_values

_BLOCK = re.compile(r".*?\.\d+(?=\.)")
"""The name of the outermost numbered module that a parameter lies in."""

_MATRICES = 3
"""Weight matrices in which a numbered block is more than a layer that is zero on purpose."""


class BaseValues(NamedTuple):
    """What reading a base showed.

    Attributes:
        nonfinite: Parameters with NaN or infinity, of quantized ones in what bitsandbytes keeps beside the numbers.
        zero: Numbered blocks that hold zeros alone, and the input embeddings where they do.
    """

    nonfinite: tuple[str, ...]
    zero: tuple[str, ...]


def read_base(parameters: tuple[BaseParameter, ...], embeddings: str | None) -> BaseValues:
    """Read the numbers of a base, on a CPU a billion at most."""
    readable: list[BaseParameter] = []
    budget = CPU_NUMBERS
    for parameter in parameters:
        on_cpu = parameter.tensor.device.type == "cpu"
        if on_cpu:
            budget -= parameter.numbers
        if budget >= 0 or not on_cpu:
            readable.append(parameter)
    tensors = {
        p.full_name: (*([] if _is_packed(p) else [p.tensor]), *quantization_statistics(p.tensor))
        for p in readable
    }
    values = read_values(tensor for group in tensors.values() for tensor in group)
    nonfinite = (
        name
        for name, group in tensors.items()
        if any(values.get(id(tensor), UNREAD).finite is False for tensor in group)
    )
    return BaseValues(tuple(nonfinite), tuple(_never_loaded(parameters, values, embeddings)))


def _never_loaded(
    parameters: tuple[BaseParameter, ...], values: dict[int, Values], embeddings: str | None
) -> Iterator[str]:
    """Parts of a base that hold zeros alone; the first of several processes may hold what others have to be handed."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return
    blocks: dict[str, list[tuple[bool, bool]]] = {}
    for parameter in parameters:
        zero = values.get(id(parameter.tensor), UNREAD).zero is True
        if zero and embeddings is not None and parameter.full_name == f"{embeddings}.weight":
            yield embeddings
        found = _BLOCK.match(parameter.full_name)
        if found:
            blocks.setdefault(found[0], []).append((zero, parameter.tensor.ndim > 1))
    for block, held in blocks.items():
        if all(zero for zero, _ in held) and sum(matrix for _, matrix in held) >= _MATRICES:
            yield block


def _is_packed(parameter: BaseParameter) -> bool:
    """Whether its bytes are other numbers than its dtype says: packed weights may be stored as floats for FSDP."""
    return parameter.numbers != parameter.tensor.numel()
