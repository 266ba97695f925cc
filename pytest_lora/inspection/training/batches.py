"""What a user gives to train with, in one form: batches, a loss, a data loader's first rows, and how to train."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from pytest_lora.inspection.placement import device_of, on_device
from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.values import shown

LossFn = Callable[[Any, Any], Tensor]
"""Called with the model and one batch; gives a scalar loss with its graph."""

LOOKED_AT = 64
"""Batches of a list whose labels are looked at; a list may be long, an iterator must not be used up."""

FEWEST, MOST = 8, 64
"""Rows to read: fewer say little of padding and prompts, more take time before the first step."""

ONCE = "its training data come as a stream, which may not be readable twice"


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


class NoHeadError(ValueError):
    """A model without a head, which makes no loss of the labels of a batch."""


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """The loss of one batch.

    Raises:
        NoHeadError: The model gives no loss though the batch has labels.
        ValueError: The model gives no loss without labels, or ``loss_fn`` gives no scalar.
    """
    if loss_fn is not None:
        with _noted("loss_fn raised this for a batch"):
            loss: Any = loss_fn(model, batch)
        if not _is_loss(loss):
            raise ValueError(f"loss_fn must return a scalar tensor, not {_described(loss)}")
        return loss
    with _noted(f"batches: the model raised this for one of {shown(list(batch))}"):
        output: Any = model(**on_device(batch, device_of(model)))
    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", output[0] if isinstance(output, tuple) and output else output)
    if not _is_loss(loss):
        without = f"batches: the model gives no scalar loss for a batch of {', '.join(map(str, batch))}; "
        if "labels" in batch:
            raise NoHeadError(f"{without}load the model with a head, or give loss_fn")
        raise ValueError(f"{without}add labels to it, or give loss_fn")
    return loss


def take_step(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    """Take an optimizer step; one that cannot do without a closure (LBFGS) gets the loss and its gradients anew."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is None or closure.default is not closure.empty:
        optimizer.step()
        return

    def again() -> Tensor:
        optimizer.zero_grad()
        made = loss()
        torch.autograd.backward(made)
        return made

    optimizer.step(again)


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


def first_rows(loader: Any, rows: int) -> tuple[tuple[dict[str, Any], ...], str]:
    """The first rows of a loader's data in batches, as its collator makes them of rows read by index.

    The loader is not iterated over, so that its order, its workers and its sampler's random numbers stay as they are.
    Random states, also those that the data and the collator hold themselves, are put back.

    Args:
        loader: Of torch, or one that accelerate made of it.
        rows: Rows of a batch.

    Returns:
        The batches, and why there are none: a stream, or the words of what the data or the collator raised.
    """
    data, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        return (), ONCE
    if collate is None or not hasattr(data, "__len__"):
        return (), "its loader says neither how many rows there are nor how they are collated"
    try:
        with quiet_libraries(), _own_states(data, collate):
            return tuple(_batches(data, _copied(collate), min(max(1, rows), MOST))), ""
    except Exception as error:  # whatever somebody's data or collator raises: the run itself will say it
        return (), f"reading its first rows raised {type(error).__name__}"


@leaves_no_trace
def _batches(data: Any, collate: Callable[[Any], Any], size: int) -> list[dict[str, Any]]:
    found = []
    for start in range(0, min(len(data), max(FEWEST, size)), size):
        batch = collate([data[i] for i in range(start, min(start + size, len(data)))])
        if isinstance(batch, Mapping) and all(isinstance(name, str) for name in batch):
            found.append(dict(batch))
    return found


def _copied(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The collator, and one inside of it, copied flatly: some make a generator at their first call and keep it."""
    if not hasattr(collate, "__dict__") or isinstance(collate, (FunctionType, MethodType, type)):
        return collate
    copied = copy.copy(collate)
    inner = vars(copied).get("data_collator")
    if inner is not None and hasattr(inner, "__dict__"):
        copied.__dict__["data_collator"] = _copied(inner)
    return copied


@contextmanager
def _own_states(*holders: Any) -> Iterator[None]:
    """Put back the generators of random numbers that data and collators keep as their own."""
    within = [
        inner for one in holders for inner in (one, getattr(one, "data_collator", None)) if inner is not None
    ]
    held = [value for one in within for value in getattr(one, "__dict__", {}).values()]
    undo: list[Callable[[], object]] = []
    for value in held:
        if isinstance(value, torch.Generator):
            undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            undo.append(
                partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
            )
        elif isinstance(value, random.Random):
            undo.append(partial(value.setstate, value.getstate()))
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train, as the user gave it.

    Attributes:
        steps: Optimizer steps; 0 looks at labels and modes only.
        rate: Learning rate of the AdamW that is made where ``optimizer`` is None; None chooses one.
        optimizer: The user's optimizer.
        scheduler: Stepped once after each step.
        max_grad_norm: Where gradients are clipped.
        scaler: A GradScaler.
        history: Losses so far.
        base_snapshot: Tensors of the base before training, by name.
        loss_fn: Makes the loss; by default the model does.
        ranks: Measure the rank of what the steps did to each adapted weight.
        tell_failures: Note what the model or the optimizer raises, where its cause is known, instead of passing it on.
    """

    steps: int
    rate: float | None
    optimizer: Any = None
    scheduler: Any = None
    max_grad_norm: float | None = None
    scaler: Any = None
    history: Sequence[float] = ()
    base_snapshot: Mapping[str, Tensor] | None = None
    loss_fn: LossFn | None = None
    ranks: bool = False
    tell_failures: bool = False

    @property
    def kept(self) -> tuple[object, ...]:
        """What has a state of its own."""
        return self.optimizer, self.scheduler, self.scaler
