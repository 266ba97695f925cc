"""Each xdist worker sees its own GPU: CUDA_VISIBLE_DEVICES, set before CUDA is started.

Where the command line or the ini file asks for GPU tests, that is before anything of the user's is imported; else
after collection, if there is a GPU test, so that the plugin changes nothing where none is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from pytest_lora.plugin.gpu import hardware
from pytest_lora.plugin.gpu_settings import gpus_per_worker
from pytest_lora.plugin.session_options import options_of

if TYPE_CHECKING:
    from pytest_lora.plugin.gpu.hardware import Hardware


@dataclass(frozen=True)
class Pin:
    """What a worker sees of the caller's devices.

    Attributes:
        caller: The caller's entries, of all devices that the session may use.
        first: Number of the first of them in the caller's numbering: N under ``--lora-device cuda:N``, else 0.
        seen: Indexes into ``caller``, the worker's own first.
        replaced: CUDA_VISIBLE_DEVICES as it was; ``None`` if it was not set.
    """

    caller: tuple[str, ...]
    first: int
    seen: tuple[int, ...]
    replaced: str | None

    def labelled(self, found: Hardware) -> Hardware:
        """The devices that this process sees, named by the caller's numbering."""
        if len(found.devices) > len(self.seen):  # not pinned, so in the caller's own order
            return found
        named = [
            replace(device, label=f"cuda:{self.first + index}", key=self.caller[index])
            for device, index in zip(found.devices, self.seen, strict=False)
        ]
        return replace(found, devices=tuple(named))


PIN = pytest.StashKey[Pin]()


def pin_early(config: pytest.Config) -> None:
    """Pin a worker before test files and conftests are imported, in a session that asks for GPU tests."""
    pin(config, str(config.known_args_namespace.lora_device), max(gpus_per_worker(config), 1))


def pin_collected(config: pytest.Config, count: int) -> None:
    """Pin a worker as its tests turn out to need it: to as many devices as the one that counts most."""
    options = options_of(config)
    former = config.stash.get(PIN, None)
    is_enough = former is not None and (options.gpus_per_worker or len(former.seen) >= count)
    if options.device.startswith(("auto", "cuda")) and not is_enough:
        pin(config, options.device, options.gpus_per_worker or count)


def pin(config: pytest.Config, device: str, count: int) -> None:
    """Let this worker see ``count`` devices, its own first; again, if it is pinned already."""
    former = config.stash.get(PIN, None)
    if former is None:
        former = _all_of_caller(device)
        if former is None:
            return
    number = int("".join(filter(str.isdecimal, os.environ["PYTEST_XDIST_WORKER"])) or 0)
    size = len(former.caller)
    seen = tuple((number + offset) % size for offset in range(min(count, size)))
    config.stash[PIN] = replace(former, seen=seen)
    os.environ[hardware.VISIBLE] = ",".join(former.caller[index] for index in seen)


def unpin(config: pytest.Config) -> None:
    """Undo it: this is no worker, but a session that a test of a worker started."""
    former = config.stash.get(PIN, None)
    if former is None:
        return
    del config.stash[PIN]
    if former.replaced is None:
        del os.environ[hardware.VISIBLE]
    else:
        os.environ[hardware.VISIBLE] = former.replaced


def _all_of_caller(device: str) -> Pin | None:
    """Everything that the session may use; ``None`` without CUDA."""
    entries = hardware.visible()
    count = hardware.count_without_starting()
    caller = tuple(entries[:count] if entries is not None else map(str, range(count)))
    first = 0
    if device.startswith("cuda:"):
        first = int(device.removeprefix("cuda:"))
        caller = caller[first : first + 1]
    replaced = os.environ.get(hardware.VISIBLE)
    return Pin(caller, first, (), replaced) if caller else None
