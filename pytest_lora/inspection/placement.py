"""Where a model and its batches are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.inspection.bitsandbytes_internals import holds_8_bit_weights
from pytest_lora.values import in_short, shown


def gathered(tensor: Any) -> Tensor:
    """A tensor that the second FSDP, or tensor parallelism, spreads over ranks, put together; any other as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def place(model: nn.Module, device: Any, optimizer: Any) -> torch.device | None:
    """Where to move a model, or None to leave it where it is, as without a wish.

    Raises:
        TypeError: ``device`` is no device.
        ValueError: It is not there, is not where the optimizer's parameters are, or the model cannot be moved.
    """
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch device such as 'cuda', not {shown(device)}")
    try:
        wanted = torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"device must be a torch device such as 'cuda', not {shown(device)}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    try:
        if wanted.type != "cuda":  # which counts its devices
            torch.ones(1, device=wanted).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # each backend has its own
        raise ValueError(
            f"device={str(device)!r}, but nothing can be computed there: {in_short(error)}"
        ) from error
    here = device_of(model)
    if wanted == here or (wanted.index is None and wanted.type == here.type):
        return None
    if optimizer is not None:
        raise ValueError(f"device={str(device)!r}, but the optimizer trains a model on {here}")
    if holds_8_bit_weights(model):
        raise ValueError(
            f"device={str(device)!r}, but the base is quantized to 8 bits on {here}, and a move leaves its scales "
            f"behind; load it on {wanted}, or leave device out"
        )
    return wanted


def moved(batch: Any, device: torch.device) -> Any:
    """A batch of any form with its tensors on a device; the batch itself stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if hasattr(batch, "to"):  # transformers' BatchEncoding, which moves in place
        return copy.copy(batch).to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
