"""GPUs that are not there: the hardware as JSON, and a card whose memory follows what tests hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pytest_lora.plugin.gpu import hardware, ledger
from tests.simulated_cuda import MACHINES

GB = 10**9


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *gigabytes: float,
    kind: str = "cuda",
    capability: tuple[int, int] | None = (8, 9),
) -> None:
    """Replace the hardware of sessions that are started as processes; no memory means no device."""
    devices = [
        {"name": f"card {i}", "total": int(size * GB), "capability": capability}
        for i, size in enumerate(gigabytes)
    ]
    told = {"kind": kind, "devices": devices, "why_none": "the test says so"}
    monkeypatch.setenv(hardware.REPLACED, json.dumps(told))
    for name in (hardware.VISIBLE, "PYTEST_XDIST_WORKER", "RUN_SLOW", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def named_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Replace the hardware of sessions by that of a machine of ``tests.simulated_cuda``."""
    one = MACHINES[name]
    slices = one.visible.split(",") if one.visible else []
    machine(monkeypatch, *[one.total / GB] * max(one.count, len(slices)), kind=one.kind)
    replaced = json.loads(os.environ[hardware.REPLACED])
    for i, device in enumerate(replaced["devices"]):
        device |= {"name": one.name, "capability": None if one.hip else one.capability}
        device |= {"key": slices[i]} if slices else {}
    monkeypatch.setenv(hardware.REPLACED, json.dumps(replaced))
    if one.visible:
        monkeypatch.setenv(hardware.VISIBLE, one.visible)


def shared(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Let processes meet in a folder of this test; the log of holds and releases."""
    log = folder / "holds.log"
    monkeypatch.setenv(ledger.FOLDER, str(folder / "locks"))
    monkeypatch.setenv(ledger.LOG, str(log))
    return log


CARD = """
from contextlib import nullcontext
import pytest
from pytest_lora.plugin.gpu.memory import MEMORY

class OutOfMemoryError(RuntimeError):
    "As torch calls its own."

class Card:
    "One GPU's memory in bytes; a block is free when nothing refers to it any more."

    total, now, top, cached, broken = 24 * 10**9, 0, 0, 0, ""

    def take(self, size):
        if self.broken:
            raise RuntimeError(self.broken)
        if self.now + size > self.total:
            raise OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        return Block(self, size)

    def fail(self, raised="", lasting="CUDA error: device-side assert triggered"):
        "Break by one error, with another one for all that comes after; with none, stay whole."
        self.broken = lasting
        raise RuntimeError(raised or lasting)

    def _sound(self):
        if self.broken:
            raise RuntimeError(self.broken)

    def synchronize(self): self._sound()
    def allocated(self, ordinal): self._sound(); return self.now
    def peak(self, ordinal): self._sound(); return self.top
    def restart(self, ordinal): self._sound(); self.top = self.now
    def peaks_kept(self): return nullcontext()
    def taken(self, ordinal): return self.now + 10**9
    def release(self): self._sound(); self.cached = 0

class Block:
    def __init__(self, card, size):
        self.card, self.size = card, size
        card.now += size
        card.cached += size
        card.top = max(card.top, card.now)

    def __del__(self):
        self.card.now -= self.size

CARD = Card()

def pytest_configure(config):
    config.stash[MEMORY] = CARD

@pytest.fixture(scope="session")
def card(): return CARD
"""
