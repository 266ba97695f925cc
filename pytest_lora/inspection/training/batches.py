"""What a user gives as batches and loss, brought into one form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.inspection.bitsandbytes_internals import holds_8_bit_weights

LossFn = Callable[[Any, Any], Tensor]
"""Called with the model and one batch; gives a scalar loss with its graph."""

LOOKED_AT = 64
"""Batches of a list whose labels are looked at; a list may be long, an iterator must not be used up."""


def take_batches(batches: Any, steps: int, loss_fn: LossFn | None) -> tuple[Any, ...]:
    """The batches that ``steps`` steps need, and of a list also some more for a look at their labels.

    Raises:
        TypeError: ``batches`` is neither a batch nor an iterable of batches.
        ValueError: There is none.
    """
    require_batches(batches, loss_fn)
    if _is_batch(batches, loss_fn):
        return (batches,)
    wanted = max(steps, LOOKED_AT) if isinstance(batches, Sequence) else max(steps, 1)
    taken = tuple(islice(batches, wanted))
    if not taken:
        raise ValueError("batches is empty: at least one batch is needed")
    if loss_fn is None:
        for batch in taken:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"batches must hold dicts of tensors, not {type(batch).__name__}; "
                    "give loss_fn for batches of another form"
                )
    return taken


def require_batches(batches: Any, loss_fn: LossFn | None) -> None:
    """Raise unless this is a batch or an iterable of batches; none is taken.

    Raises:
        TypeError: It is neither.
    """
    if _is_batch(batches, loss_fn):
        return
    if isinstance(batches, (str, bytes, Tensor, nn.Module)) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be a batch (a dict of tensors) or an iterable of batches, "
            f"not {type(batches).__name__}"
        )


def _is_batch(value: Any, loss_fn: LossFn | None) -> bool:
    if isinstance(value, Mapping):
        return True
    return loss_fn is not None and isinstance(value, (Tensor, tuple)) and not _holds_batches(value)


def _holds_batches(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and not isinstance(value[0], Tensor)


def generators_of(batches: Any) -> Iterator[torch.Generator]:
    """Random generators that iterating over a ``DataLoader`` advances."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    holders = (
        batches,
        getattr(batches, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = (getattr(holder, "generator", None) for holder in holders)
    yield from {id(g): g for g in found if isinstance(g, torch.Generator)}.values()


class NoLossError(ValueError):
    """The model gives no loss for a batch, or a function for the loss gives no scalar."""


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """The loss of one batch.

    Raises:
        NoLossError: The model gives no loss, or ``loss_fn`` gives no scalar.
    """
    if loss_fn is not None:
        loss: Any = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise NoLossError(f"loss_fn must return a scalar tensor, not {_described(loss)}")
        return loss
    output: Any = model(**on_device(batch, device_of(model)))
    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", output[0] if isinstance(output, tuple) and output else output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise NoLossError(
            f"batches: the model gives no scalar loss for a batch of {', '.join(map(str, batch))}; "
            "add labels to it, or give loss_fn"
        )
    return loss


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
        raise TypeError(f"device must be a torch device such as 'cuda', not {device!r}")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cuda', not {device!r}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
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


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
