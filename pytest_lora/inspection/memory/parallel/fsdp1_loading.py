"""What FSDP1 makes and frees on the device while it cuts a model: the cache keeps it, in pieces."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pytest_lora.inspection.memory.parallel.model import Loading
from pytest_lora.inspection.memory.parallel.ranks import resizes_followed
from pytest_lora.inspection.memory.stand_ins import StandIns
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE, StorageTracker
from pytest_lora.inspection.memory.swapped import swapped
from pytest_lora.inspection.quiet import collector

_HOME = "torch.distributed.fsdp.fully_sharded_data_parallel"


@contextmanager
def cutting_followed(model: nn.Module, unit_of: dict[int, int], *, offloaded: bool) -> Iterator[Loading]:
    """Record what ``FullyShardedDataParallel`` makes of a model that lies in the host's memory.

    Unit after unit comes onto the device as a whole, is sent to the other ranks, flattened, and cut
    (``_init_param_handle_from_module``).

    Args:
        model: The model.
        unit_of: The unit of each parameter, by identity.
        offloaded: Whether each part goes back to the host's memory.
    """
    tracker = StorageTracker(None, StandIns(padded=False, experts=None))
    _ignore_host(tracker, model)
    fsdp: Any = importlib.import_module(_HOME)
    first: Any = importlib.import_module("torch.distributed.fsdp._init_utils")
    cut = fsdp._init_param_handle_from_module

    def cut_in_its_unit(state: Any, module: nn.Module, *given: Any) -> Any:
        own = first._get_orig_params(module, state._ignored_params)
        tracker.unit = next((unit_of.get(id(parameter), OUTSIDE) for parameter in own), OUTSIDE)
        del own  # it holds a parameter, whose storage is to go within the unit
        done = cut(state, module, *given)
        if offloaded and state._handle is not None:
            tracker.moved_away(state._handle.flat_param)
        return done

    def moved(module: nn.Module, ignored: set[nn.Parameter], *_: Any) -> None:
        for parameter in _own_parameters(module, fsdp.FullyShardedDataParallel):
            if parameter not in ignored:
                parameter.data = torch.empty_like(parameter.data)

    replaced = [(fsdp, cut.__name__, cut_in_its_unit), (first, "_move_module_to_device", moved)]
    found = Loading(tracker.events, tracker.units, tracker.sizes)
    try:
        with swapped(replaced), resizes_followed(tracker), collector.paused(), tracker.recorded():
            yield found
    finally:
        tracker.recording = False


def _ignore_host(tracker: StorageTracker, model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.ignore(tensor)


def _own_parameters(module: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Parameter]:
    """Those outside of parts that were cut already, breadth first as ``_move_module_to_device`` finds them."""
    waiting = deque([module])
    while waiting:
        current = waiting.popleft()
        yield from current.parameters(recurse=False)
        waiting.extend(child for child in current.children() if not isinstance(child, kind))
