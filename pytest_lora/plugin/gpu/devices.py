"""The devices that a session may use, as this process sees them, and whether a test can run on its share of them.

Each xdist worker sees its own GPU: CUDA_VISIBLE_DEVICES, set before CUDA is started. Where the command line or the ini
file asks for GPU tests, that is before anything of the user's is imported; else after collection, if there is a GPU
test, so that the plugin changes nothing where none is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from pytest_lora.plugin.gpu import hardware
from pytest_lora.plugin.gpu.marks import lacking
from pytest_lora.plugin.option_values import gpus_per_worker
from pytest_lora.plugin.session_options import options_of

if TYPE_CHECKING:
    import torch

    from pytest_lora.plugin.gpu.hardware import Device, Hardware
    from pytest_lora.plugin.gpu.marks import Need


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


class Devices:
    """What ``--lora-device``, the hardware and the worker's pin leave of the devices."""

    def __init__(self, config: pytest.Config) -> None:
        self._wanted = options_of(config).device
        self._pin = config.stash.get(PIN, None)
        self._known: Hardware | None = None
        kind, _, index = self._wanted.partition(":")
        self._kind = kind
        self._only = int(index) if index else None

    @property
    def hardware(self) -> Hardware:
        """What this process sees, as far as it has had to be found out."""
        if self._known is None:
            self._known = self._named(hardware.found(self._kind))
        return self._known

    def obstacle(self, need: Need) -> str:
        """Why a test cannot run here: what it needs and what there is; empty if it can.

        torch is asked only if all else says that the test can run, which will import torch anyway.
        """
        lack = self._lack(need)
        if lack or self.hardware.is_sure:
            return lack
        self._known = self._named(hardware.confirmed(self._kind))
        return self._lack(need)

    @property
    def hold_fixtures(self) -> bool:
        """Whether the fixtures are on a GPU, also in a test that does not ask for one; see :func:`device_of`."""
        try:
            seen = self.hardware
        except Exception:  # of a torch that does not load, say: the fixtures raise it where it belongs
            return False
        return bool(seen.devices) and (self._kind != "auto" or seen.kind == "cuda")

    def of(self, need: Need) -> dict[int, Device]:
        """The devices of a test that can run, by torch's number of them."""
        first = self._first
        return {number: self.hardware.devices[number] for number in range(first, first + need.count)}

    def key(self, device: Device) -> str:
        """The name of a device that all processes of the machine give it."""
        return f"{self.hardware.kind}:{device.key}"

    @property
    def _first(self) -> int:
        """torch's number of the first device that tests may use: a pinned worker sees no other."""
        return self._only if self._only is not None and self._pin is None else 0

    def _named(self, found: Hardware) -> Hardware:
        return self._pin.labelled(found) if self._pin else found

    def _lack(self, need: Need) -> str:
        seen = self.hardware
        if not seen.devices:
            return f"needs a GPU; there is none: {seen.why_none}"
        if self._first >= len(seen.devices):
            return (
                f"needs a GPU; there is none: --lora-device {self._wanted}, and there are {len(seen.devices)}"
            )
        if self._pin and len(seen.devices) > len(self._pin.seen):
            meant = len(self._pin.seen)
            return (
                f"needs a worker that sees {meant} of the GPUs, and this one sees {len(seen.devices)}: CUDA was "
                f"started before it could be pinned; ini lora_gpus_per_worker = {meant} pins workers before anything "
                "is imported"
            )
        mine = seen.devices[self._first :][: need.count if self._only is None else 1]
        lack = lacking(need, mine, () if self._only is not None else seen.devices)
        if lack:
            return lack + self._hint(need, len(mine))
        if need.limit and seen.kind == "mps":
            return "needs a GPU whose peak memory torch counts; for mps it does not"
        return ""

    def _hint(self, need: Need, seen: int) -> str:
        """How a worker would see enough devices, where there are enough."""
        if self._pin is None or not seen < need.count <= len(self._pin.caller):
            return ""
        return f" of {len(self._pin.caller)}: set ini lora_gpus_per_worker = {need.count}"


def device_of(config: pytest.Config) -> torch.device:
    """The device of the LoRA fixtures, by ``--lora-device``: with auto CUDA if there is any, else the CPU.

    It has an index, so that it equals the device of the tensors on it.

    Raises:
        ValueError: It is not there.
    """
    import torch

    wanted = options_of(config).device
    kind, _, index = wanted.partition(":")
    if wanted == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    seen = hardware.confirmed(kind)
    if not seen.devices:
        raise ValueError(f"--lora-device {wanted}: there is none: {seen.why_none}")
    number = int(index) if index and PIN not in config.stash else 0
    if number >= len(seen.devices):
        raise ValueError(f"--lora-device {wanted}: there are {len(seen.devices)}")
    return torch.device(kind, number)
