"""Ranks that are not there: a process group without processes, and a device for it without memory."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytest_lora.inspection.memory.meta_answers import swapped
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE, StorageTracker
from pytest_lora.inspection.skeleton import META


class GroupRunningError(ValueError):
    """The process has a process group of its own."""


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A default process group of so many ranks, of which this process is the first; it sends nothing.

    Rank 0 holds the most where parts are uneven: torch gives the remainder to the first ranks.

    Raises:
        GroupRunningError: This process is in a process group already.
    """
    dist: Any = importlib.import_module("torch.distributed")
    if dist.is_initialized():
        raise GroupRunningError(
            "gpus: this process is a rank of a running process group; estimate a step on several GPUs before "
            "init_process_group, or in another process"
        )
    store: Any = importlib.import_module("torch.testing._internal.distributed.fake_pg").FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Stream:
    """A queue of a device on which nothing runs; the allocator keeps the blocks of each apart."""

    def __init__(self) -> None:
        self.number = next(_numbers)

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None: ...


_numbers = itertools.count()
_computation = _Stream()
_running = [_computation]
"""The streams that were entered, the one that runs at last."""


@contextmanager
def _entered(stream: _Stream | None) -> Iterator[None]:
    _running.append(_running[-1] if stream is None else stream)
    try:
        yield
    finally:
        _running.pop()


class _Event:
    def record(self, *_: Any) -> Any:
        return self

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class _Device:
    """What torch asks of ``torch.cuda`` and the like, for the meta device."""

    Stream = staticmethod(lambda *_, **__: _Stream())
    Event = staticmethod(lambda *_, **__: _Event())
    current_stream = staticmethod(lambda *_: _running[-1])
    stream = staticmethod(_entered)
    current_device = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda *_: None)
    is_available = staticmethod(lambda: True)
    set_device = staticmethod(lambda *_: None)


@contextmanager
def meta_as_device() -> Iterator[None]:
    """Let FSDP take the meta device for an accelerator that holds its parameters."""
    importlib.import_module("torch.distributed._tools.fake_collectives")  # collectives for the meta device
    first: Any = importlib.import_module("torch.distributed.fsdp._init_utils")
    second: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fully_shard")
    group: Any = importlib.import_module(
        "torch.distributed.fsdp._fully_shard._fsdp_param_group"
    ).FSDPParamGroup
    replaced: list[tuple[Any, str, Any]] = [
        (torch, "meta", _Device),
        (torch._C, "_get_accelerator", lambda *_: META),
        (torch.accelerator, "current_stream", lambda *_: _running[-1]),
        (first, "_need_to_materialize_module", lambda *_: (False, False)),
        (second, "_get_device_from_mesh", lambda mesh: META),
        (group, "_validate_no_meta_params", lambda self: None),
        (torch.Tensor, "data_ptr", _address(torch.Tensor.data_ptr)),
        (torch.UntypedStorage, "data_ptr", _address(torch.UntypedStorage.data_ptr)),
    ]
    with swapped(replaced):
        yield


def _address(real: Any) -> Any:
    """Addresses that tell one storage from another, which FSDP1 compares; on the meta device all are 0."""

    def address(held: Any) -> int:
        if held.device != META:
            return int(real(held))
        return id(held if isinstance(held, torch.UntypedStorage) else held.untyped_storage())

    return address


def outside(tracker: StorageTracker, home: Any, name: str) -> tuple[Any, str, Any]:
    """What a function of the end of the backward frees belongs to no layer: a replacement for ``swapped``."""
    function = vars(home)[name]

    def called(*given: Any, **named: Any) -> Any:
        tracker.unit = OUTSIDE
        return function(*given, **named)

    return home, name, called


@contextmanager
def resizes_followed(tracker: StorageTracker) -> Iterator[None]:
    """``UntypedStorage.resize_`` is no operation that a dispatch mode sees; FSDP frees and refills storages with it.

    Storages are made in the stream that runs.
    """
    tracker.running = lambda: _running[-1].number
    resize: Any = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        before = storage.nbytes()
        result = resize(storage, size)
        tracker.resized(storage, before)
        return result

    with swapped([(torch.UntypedStorage, "resize_", resized)]):
        yield
