"""How much GPU memory there is, as users say it: a size, or the device itself."""

from __future__ import annotations

import re
from typing import Any

from pytest_lora.facts.numbers import parse_bytes
from pytest_lora.values import shown

_SMALLEST = 2**20


_CARDS = re.compile(r"(\d+)\s*[xX]\s*(\S.*)")


def cards_and_budget(budget: Any, gpus: Any = None) -> tuple[int | None, Any]:
    """How many cards a budget such as ``"8x80GiB"`` names, and the memory of one; None where it names none.

    Raises:
        ValueError: It names another number than ``gpus``, or none at all.
    """
    match = _CARDS.fullmatch(budget.strip()) if isinstance(budget, str) else None
    if match is None:
        return gpus, budget
    count = int(match[1])
    if count < 1:
        raise ValueError(f'budget: {shown(budget)} names no card; write "8x80GiB"')
    if gpus is not None and gpus != count:
        raise ValueError(
            f"budget: {shown(budget)} names {count} cards, and gpus {gpus}; leave one of them out"
        )
    return count, match[2]


def require_budget(budget: Any, name: str = "budget") -> int:
    """Bytes of a budget: a size, or a CUDA device, which is asked for its memory. Errors call it by this name.

    Raises:
        TypeError, ValueError: It is no size, has no unit, or there is no such device.
    """
    if is_device(budget):
        return _device_memory(budget)
    limit = parse_bytes(budget, name)
    if limit < _SMALLEST:
        raise ValueError(f'{name} is {limit} bytes; write "{limit}GiB" for gibibytes')
    return limit


def is_device(budget: Any) -> bool:
    """Whether a budget is a CUDA device, as ``"cuda"``, ``"cuda:0"`` or a ``torch.device``."""
    if isinstance(budget, str):
        return budget.partition(":")[0] == "cuda"
    return type(budget).__name__ == "device" and bool(budget.type == "cuda")


def _device_memory(device: Any) -> int:
    import torch

    known = re.fullmatch(r"cuda(:\d{1,3})?", str(device)) and torch.cuda.is_available()
    if not known or (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f'budget is the device {shown(str(device))}, but there is no such CUDA device here; write "24GiB"'
        )
    size: int = torch.cuda.get_device_properties(device).total_memory
    return size
