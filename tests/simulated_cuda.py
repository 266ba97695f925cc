"""CUDA played by the CPU: torch's own functions run over devices, generators and memory that are not there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


@dataclass(frozen=True)
class Machine:
    """The GPUs of a machine, all alike.

    Attributes:
        kind: torch's name of their sort.
        name: Of the product.
        total: Memory of each, in bytes.
        capability: CUDA compute capability; None where there is no such thing.
        count: How many there are.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
        hip: Version of ROCm; None without.
        workspace: Bytes of cuBLAS's workspace.
    """

    kind: str
    name: str
    total: int
    capability: tuple[int, int] | None = None
    count: int = 1
    visible: str | None = None
    hip: str | None = None
    workspace: int = 8_519_680


MACHINES = {
    "H200": Machine("cuda", "NVIDIA H200", 150_110_011_392, (9, 0), workspace=32 * 2**20),
    "L4": Machine("cuda", "NVIDIA L4", 23_660_000_000, (8, 9)),
    "two L4": Machine("cuda", "NVIDIA L4", 23_660_000_000, (8, 9), count=2),
    "MIG": Machine(
        "cuda",
        "NVIDIA H100 MIG 2g.20gb",
        20_937_965_568,
        (9, 0),
        visible="MIG-5ab1cd1b-0b1c-5f2e-8a35-2f0a4d9b6a11,MIG-5ab1cd1b-0b1c-5f2e-8a35-2f0a4d9b6a12",
        workspace=32 * 2**20,
    ),
    "ROCm": Machine("cuda", "AMD Instinct MI300X", 205_822_885_888, (9, 4), hip="6.2", workspace=128 * 2**20),
    "MPS": Machine("mps", "Apple GPU", 22_906_503_168),
}
"""Machines that GPU tests meet. A process sees one MIG slice at most, however many are visible."""


@dataclass
class PlayedCuda:
    """What the played CUDA has seen.

    Attributes:
        machine: What is played.
        started: Whether anything has started CUDA.
        generators: Those of its devices.
        now, peak: Bytes allocated on the first device, and the most since the last reset.
        moves: Everything that was moved to a GPU.
    """

    machine: Machine
    started: bool = False
    generators: tuple[torch.Generator, ...] = ()
    now: int = 0
    peak: int = 0
    moves: list[object] = field(default_factory=list)

    def start(self) -> None:
        """As torch's ``_lazy_init``: the seeds that wait are set."""
        if not self.started:
            self.started = True
            for call in torch.cuda._lazy_seed_tracker.get_calls():
                if call:
                    call[0]()

    def take(self, size: int) -> None:
        """Allocate bytes; a negative size frees them."""
        self.now += size
        self.peak = max(self.peak, self.now)


def play(monkeypatch: pytest.MonkeyPatch, machine: Machine, *, started: bool = False) -> PlayedCuda:
    """Let torch see the GPUs of a machine whose kind is CUDA, in this process."""
    from torch._utils import _LazySeedTracker

    played = PlayedCuda(machine, started)
    played.generators = tuple(torch.Generator() for _ in range(machine.count))
    for generator in played.generators:
        generator.seed()
    major, minor = machine.capability or (0, 0)
    properties = SimpleNamespace(
        name=machine.name, total_memory=machine.total, major=major, minor=minor, uuid="played"
    )

    def reset(device: int) -> None:
        played.peak = played.now

    def stats(device: Any = None) -> dict[str, int]:
        return {"allocated_bytes.all.current": played.now, "allocated_bytes.all.peak": played.peak}

    def asked(answer: Any) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            played.start()
            return answer

        return function

    cuda = torch.cuda
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: played.started,
        "device_count": lambda: machine.count,
        "init": played.start,
        "_lazy_init": played.start,
        "_lazy_seed_tracker": _LazySeedTracker(),
        "default_generators": played.generators,
        "current_device": asked(0),
        "get_device_properties": asked(properties),
        "get_device_capability": asked((major, minor)),
        "mem_get_info": lambda device=None: (machine.total - played.now, machine.total),
        "synchronize": asked(None),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(cuda.random, "_lazy_init", played.start)
    monkeypatch.setattr(cuda.random, "device_count", lambda: machine.count)
    monkeypatch.setattr(cuda.random, "current_device", lambda: 0)
    monkeypatch.setattr(cuda.random, "is_initialized", lambda: played.started, raising=False)
    monkeypatch.setattr(cuda.memory, "memory_stats", stats)
    monkeypatch.setattr(cuda.memory, "_get_device_index", lambda device, optional=False: 0)
    # A torch that is built for CUDA has its optimizers ask here, whatever device the parameters are on.
    stream = SimpleNamespace(is_capturing=lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.version, "hip", machine.hip)
    monkeypatch.setattr(torch.version, "cuda", None if machine.hip else "13.0")
    for name, value in {
        "_cuda_getDeviceCount": lambda: machine.count,
        "_cuda_resetPeakMemoryStats": reset,
        "_cuda_getCublasWorkspaceSize": asked(machine.workspace),
        "_cuda_clearCublasWorkspaces": lambda: None,
    }.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    _note_moves(monkeypatch, played)
    return played


def _note_moves(monkeypatch: pytest.MonkeyPatch, played: PlayedCuda) -> None:
    """Let what is moved to CUDA stay where it is, and note it."""
    for kind in (torch.Tensor, nn.Module):
        real: Any = kind.to

        def to(self: Any, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            if not any(_is_cuda(value) for value in (*args, *kwargs.values())):
                return _real(self, *args, **kwargs)
            played.start()
            played.moves.append(self)
            # Another object, as it would be, so that what was not moved can be told from what was.
            return self if isinstance(self, nn.Module) else copy.copy(self)

        monkeypatch.setattr(kind, "to", to)


def _is_cuda(value: object) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"
