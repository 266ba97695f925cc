"""Follows the life of every storage that is made while a step runs on the meta device."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pytest_lora.inspection.memory.meta_answers import KnownResults, StandIns
from pytest_lora.inspection.memory.operations import flops_of
from pytest_lora.inspection.memory.patience import tick

OUTSIDE = -1
"""Unit of an event that belongs to no repeated layer."""

_META = torch.device("meta")

_RESULTS = KnownResults()
"""Of all steps: those of one base have most shapes in common."""


_OPERATIONS: dict[int, tuple[Any, tuple[str, bool]]] = {}
"""By their id, which they keep as they are kept here: torch hashes and names them in Python."""


def _operation(func: Any) -> tuple[str, bool]:
    """The name of an operation, and whether all that it gives are views of what it is given."""
    known = _OPERATIONS.get(id(func))
    if known is None:
        aliases = [part.alias_info for part in func._schema.returns]
        looks = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        known = _OPERATIONS[id(func)] = func, (str(func), looks)
    return known[1]


class NeedsValuesError(RuntimeError):
    """An operation cannot run without values."""


class StorageTracker:
    """Records when storages of a device are made and freed, in order.

    Attributes:
        events: ``i`` where storage ``i`` is made, ``~i`` where it is freed.
        units: The unit (repeated layer) that was running at each event, or ``OUTSIDE``.
        phases: The phase of each event.
        sizes: Bytes of each storage, before the allocator rounds them.
        categories, operations: What each storage holds, and what made it.
        streams: The stream in which each storage was made, 0 for that of the computation.
        running: Says which stream runs.
        flops: Unit, phase and floating-point operations of what computes, in order.
    """

    def __init__(self, vocab_size: int | None, stand_ins: StandIns, device: torch.device = _META) -> None:
        self.events: list[int] = []
        self.units: list[int] = []
        self.phases: list[str] = []
        self.sizes: list[int] = []
        self.categories: list[str] = []
        self.operations: list[str] = []
        self.streams: list[int] = []
        self.running: Callable[[], int] = lambda: 0
        self.flops: list[tuple[int, str, int]] = []
        self.unit = OUTSIDE
        self.phase = "forward"
        self.recording = True
        self._vocab_size = vocab_size
        self._stand_ins = stand_ins
        self._device = device
        self._held_for = ""
        self._live: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """A storage that was there before the step is no event of it."""
        storage = tensor.untyped_storage()
        key = id(storage)
        self._live[key] = -1
        # A layer may replace what it holds; the next storage at the same place is another one.
        self._watched[key] = weakref.ref(storage, lambda _: self._freed(key))

    def recategorize(self, tensor: torch.Tensor, category: str) -> None:
        """Say what a storage turned out to hold."""
        index = self._live.get(id(tensor.untyped_storage()), -1)
        if index >= 0:
            self.categories[index] = category

    def count(self, flops: int) -> None:
        """Add floating-point operations of what runs now."""
        self.flops.append((self.unit, self.phase, flops))

    def leave(self, *_: Any) -> None:
        """A hook: the last unit has run. Where it runs again in the backward, its own gradients are next."""
        if self.phase != "backward":
            self.unit = OUTSIDE

    @contextmanager
    def holding(self, category: str) -> Iterator[None]:
        """What is made inside holds this."""
        before, self._held_for = self._held_for, category
        try:
            yield
        finally:
            self._held_for = before

    def resized(self, storage: torch.UntypedStorage, before: int) -> None:
        """A storage was freed and kept, or filled again: FSDP does that with gathered parameters."""
        key, after = id(storage), storage.nbytes()
        if storage.device != self._device or before == after:
            return
        index = self._live.get(key, -1)
        if index >= 0 and self.recording:
            self._event(~index)
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, lambda _: self._freed(key))
        self._live[key] = -1
        if after and self.recording:
            self._live[key] = self._new(after, "gather", "gathered parameters")

    def moved_away(self, tensor: torch.Tensor) -> None:
        """A storage went to another device."""
        key = id(tensor.untyped_storage())
        index, self._live[key] = self._live[key], -1
        self._event(~index)

    def recorded(self) -> AbstractContextManager[Any]:
        """Follow what happens inside."""

        def dispatch(
            mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            for kind in types:
                if kind.__name__ == "DTensor":
                    return NotImplemented  # it takes itself apart into operations on what this rank holds
            return self._run(func, args, kwargs or {})

        # Without the wrapper that keeps torch.compile out of it, which costs a tenth of a trace.
        plain = {"__torch_dispatch__": dispatch, "_should_skip_dynamo": classmethod(lambda kind: False)}
        mode: Any = type("Recording", (TorchDispatchMode,), plain)
        context: AbstractContextManager[Any] = mode()
        return context

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tick(self.phase)
        name, looks = _operation(func)
        looks = looks and not self._stand_ins.knows(func)
        held = [] if looks else self._stand_ins.held_by_the_kernel(func, args)  # as long as this call runs
        for kernel, tensor in held:
            self._made(tensor, kernel)
        out = None if looks else self._stand_ins.answer(func, args, kwargs)
        try:
            if looks:
                out = func(*args, **kwargs)
            elif out is None:
                out = self._computed(func, args, kwargs)
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise NeedsValuesError(f"{func} in the {self.phase} needs values: {reason}") from error
        if not looks and (flops := flops_of(func, args, kwargs, out)):
            self.count(flops)
        if isinstance(out, torch.Tensor):
            self._made(out, name)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._made(leaf, name)
        return out

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result; where values from the host meet tensors without, they lose theirs, as if moved to the GPU."""
        try:
            return _RESULTS.run(func, args, kwargs)
        except (NotImplementedError, RuntimeError):
            devices = {
                leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            }
            if devices != {"cpu", "meta"}:
                raise
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(_META), (args, kwargs))
            return _RESULTS.run(func, args, kwargs)

    def _made(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.device != self._device:
            return
        part: torch.Tensor = getattr(tensor, "_local_tensor", tensor)  # of a distributed tensor
        storage = part.untyped_storage()
        key = id(storage)
        if key in self._live:
            return
        size = storage.nbytes()
        if not size:
            return
        self._watched[key] = weakref.ref(storage, lambda _: self._freed(key))
        self._live[key] = self._new(size, name, self._held_for or self._category(name, tensor))

    def _new(self, size: int, operation: str, category: str) -> int:
        index = len(self.sizes)
        self.sizes.append(size)
        self.operations.append(operation)
        self.categories.append(category)
        self.streams.append(self.running())
        self._event(index)
        return index

    def _freed(self, key: int) -> None:
        index = self._live.pop(key)
        del self._watched[key]
        if index >= 0 and self.recording:
            self._event(~index)

    def _event(self, event: int) -> None:
        self.events.append(event)
        self.units.append(self.unit)
        self.phases.append(self.phase)

    def _category(self, operation: str, tensor: torch.Tensor) -> str:
        if "dequantize" in operation:
            return "dequantization buffers"
        if self._vocab_size is not None and self._vocab_size in tensor.shape:
            return "logits and loss"
        return "activations"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from warning about a step that nobody trains."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
