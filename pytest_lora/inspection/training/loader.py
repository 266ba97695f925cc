"""The first rows of a data loader as it collates them, without iterating over it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state import leaves_no_trace

FEWEST, MOST = 8, 64
"""Rows to read: fewer say little of padding and prompts, more take time before the first step."""

ONCE = "its training data come as a stream, which may not be readable twice"


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
