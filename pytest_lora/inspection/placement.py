"""Where a model and its batches are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def place(model: nn.Module, device: Any, optimizer: Any) -> torch.device | None:
    """Where to run a model, or None for where it is.

    Without a wish that is the GPU, for a model that lies on the CPU as a whole; one with an optimizer of its own stays
    where the optimizer's state is.

    Raises:
        TypeError: ``device`` is no device.
        ValueError: It is not there, or is not where the optimizer's parameters are.
    """
    here = device_of(model)
    if device is None:
        on_cpu = all(p.device.type == "cpu" for p in model.parameters())
        return torch.device("cuda") if on_cpu and optimizer is None and torch.cuda.is_available() else None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch device such as 'cuda', not {device!r}")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cuda', not {device!r}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if optimizer is not None and wanted.type != here.type:
        raise ValueError(f"device={str(device)!r}, but the optimizer trains a model on {here}")
    return None if wanted == here else wanted


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
