"""What a user gives as batches and loss, brought into one form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pytest_lora.inspection.placement import device_of, on_device
from pytest_lora.values import shown

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
    with _noted("batches raised this where it was iterated over"):
        taken = tuple(islice(batches, wanted))
    if not taken:
        raise ValueError("batches is empty: at least one batch is needed")
    if loss_fn is None:
        for batch in taken:
            if isinstance(batch, Mapping) and not all(isinstance(key, str) for key in batch):
                raise TypeError(
                    "batches must hold dicts from names of the model's arguments to tensors, "
                    f"not {shown(dict(batch))}"
                )
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"batches must hold dicts of tensors, not {shown(batch)}; "
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
            f"batches must be a batch (a dict of tensors) or an iterable of batches, not {shown(batches)}"
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
        with _noted("loss_fn raised this for a batch"):
            loss: Any = loss_fn(model, batch)
        if not _is_loss(loss):
            raise NoLossError(f"loss_fn must return a scalar tensor, not {_described(loss)}")
        return loss
    with _noted(f"batches: the model raised this for one of {shown(list(batch))}"):
        output: Any = model(**on_device(batch, device_of(model)))
    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", output[0] if isinstance(output, tuple) and output else output)
    if not _is_loss(loss):
        raise NoLossError(
            f"batches: the model gives no scalar loss for a batch of {', '.join(map(str, batch))}; "
            "add labels to it, or give loss_fn"
        )
    return loss


@contextmanager
def _noted(note: str) -> Iterator[None]:
    """Say with what the user gave something of the user's own was called when it raised."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _is_loss(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"


def names_of(batches: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of what some batches hold, each once."""
    return tuple(dict.fromkeys(str(n) for batch in batches if isinstance(batch, Mapping) for n in batch))
