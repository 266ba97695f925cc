"""How much GPU memory there is, as users say it: a size, or the device itself."""

from __future__ import annotations

from typing import Any

from pytest_lora.facts.byte_sizes import parse_bytes

_SMALLEST = 2**20


def require_budget(budget: Any) -> int:
    """Bytes of a budget: a size, or a CUDA device, which is asked for its memory.

    Raises:
        TypeError, ValueError: It is no size, has no unit, or there is no such device.
    """
    if is_device(budget):
        return _device_memory(budget)
    limit = parse_bytes(budget, "budget")
    if limit < _SMALLEST:
        raise ValueError(f'budget is {limit} bytes; write "{limit}GiB" for gibibytes')
    return limit


def is_device(budget: Any) -> bool:
    """Whether a budget is a CUDA device, as ``"cuda"``, ``"cuda:0"`` or a ``torch.device``."""
    return bool(getattr(budget, "type", str(budget).partition(":")[0]) == "cuda")


def _device_memory(device: Any) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f'budget is the device {str(device)!r}, but there is no CUDA device here; write "24GiB"'
        )
    size: int = torch.cuda.get_device_properties(device).total_memory
    return size
