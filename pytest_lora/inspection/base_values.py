"""What the numbers of a base show: whether they are finite, whether whole parts were never loaded, and which rows
of its vocabulary were added and never trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.model import InitialRows
from pytest_lora.inspection.base import BaseParameter
from pytest_lora.inspection.bitsandbytes_internals import quantization_statistics
from pytest_lora.inspection.layers import CPU_NUMBERS, UNREAD, Values, read_values
from pytest_lora.inspection.survey import Survey

_BLOCK = re.compile(r".*?\.\d+(?=\.)")
"""The name of the outermost numbered module that a parameter lies in."""

_MATRICES = 3
"""Weight matrices in which a numbered block is more than a layer that is zero on purpose."""

SAMPLE = 512
"""Rows that are looked at first: a row that is near their mean is rare, and only then every row is read."""

SUSPICIOUS = 0.5
"""Share of the spread of the sample within which its mean makes it worth reading on; that of 512 rows is off by 4 %."""

EQUAL = 0.01
"""Share of the spread within which rows are what the resizing made them. transformers draws them around the mean with
3e-5 of it (``_init_added_embeddings_weights_with_mean``: 1e-9 of the covariance); bfloat16 rounds a number to 0.4 %."""

CHUNK = 4096


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


def initial_rows(survey: Survey, base: BaseFacts) -> Iterator[InitialRows]:
    """The added rows of the input embedding and of the head, tied ones once.

    ``resize_token_embeddings`` puts added rows at the mean of the old ones (``mean_resizing=True``, its default since
    transformers 4.46). Those that it draws at random (``mean_resizing=False``) look as any others do.
    """
    inputs, outputs = base.input_embeddings, base.output_embeddings
    sides = [inputs, *([outputs] if outputs and inputs not in base.tied_to(outputs) else [])]
    for name in filter(None, sides):
        weight = readable_weight(survey.modules.get(name))
        if weight is None:
            continue
        count = _rows_at_the_mean(weight)
        if count:
            first = weight.shape[0] - count
            padding = getattr(getattr(survey.root, "config", None), "pad_token_id", None)
            yield InitialRows(name, first, count, count == 1 and padding == first)


def readable_weight(module: nn.Module | None) -> Tensor | None:
    """The weight of an embedding or a head, where its rows can be read one by one; else None."""
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor)
        # A row of a sharded tensor (DTensor) would have to be asked of every process.
        or type(weight) not in (Tensor, nn.Parameter)
        or weight.is_meta
        or not weight.is_floating_point()
        or weight.dim() != 2
    ):
        return None
    return weight.detach() if weight.shape[0] > 1 else None


def _rows_at_the_mean(weight: Tensor) -> int:
    """How many rows at the end are equal to each other and to the mean of all rows before them."""
    last = weight[-1].float()
    step = max(1, weight.shape[0] // SAMPLE)
    sample = weight[::step].float()
    spread = float((sample - sample.mean(0)).square().mean().sqrt())
    if not spread > 0 or _distance(last, sample.mean(0)) > SUSPICIOUS * spread:
        return 0
    count = _equal_to(weight, last, EQUAL * spread)
    if count == weight.shape[0]:
        return 0
    return count if _distance(last, _mean(weight[:-count])) <= EQUAL * spread else 0


def _equal_to(weight: Tensor, row: Tensor, tolerance: float) -> int:
    """How many rows at the end are this one."""
    count = 0
    for end in range(weight.shape[0], 0, -CHUNK):
        chunk = weight[max(0, end - CHUNK) : end]
        same = ((chunk.float() - row).square().mean(1).sqrt() <= tolerance).flip(0).tolist()
        count += same.index(False) if False in same else len(same)
        if False in same:
            break
    return count


def _mean(rows: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device="cpu")
    for start in range(0, rows.shape[0], CHUNK):
        total += rows[start : start + CHUNK].float().sum(0).cpu()
    return (total / rows.shape[0]).float().to(rows.device)


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().mean().sqrt())
