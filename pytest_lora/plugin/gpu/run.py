"""What is known of one GPU test while it runs, and how it travels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pytest_lora.plugin.gpu.marks import Need
from pytest_lora.plugin.options import GPU_PROPERTY

if TYPE_CHECKING:
    from pytest_lora.plugin.gpu.hardware import Device


@dataclass(frozen=True)
class Prediction:
    """What an estimate says of a test's memory: its peak, and what that is made of, in bytes."""

    peak: int
    breakdown: dict[str, int] = field(default_factory=dict)


PREDICTION = pytest.StashKey[Prediction]()
"""In the stash of a test: whoever estimates puts it there before the test ends, for reports and failures."""


@dataclass
class Run:
    """One GPU test: what it needs, what it got, and what was measured.

    Attributes:
        is_asked: Whether the test asks for a GPU by its marks; else its fixtures are on one all the same.
        need: From its marks.
        devices: Its devices, by torch's number of them; none if it does not run.
        reason: Why it does not run; empty if it does.
        broken_by: The test that broke CUDA, if that is why.
        problem: An error from before its set-up, raised there.
        before: Bytes allocated when it began.
        lasting: Those of fixtures that outlive tests.
        peak: The most bytes that were allocated at a time on one device, so far; ``None`` if unknown.
        left: Bytes that it left behind; ``None`` if unknown.
        seconds: Of the call.
        errors: Exceptions of this test, until their frames are cleared.
    """

    is_asked: bool = True
    need: Need = field(default_factory=Need)
    devices: dict[int, Device] = field(default_factory=dict)
    reason: str = ""
    broken_by: str = ""
    problem: Exception | None = None
    before: int = 0
    lasting: int = 0
    peak: int | None = None
    left: int | None = None
    seconds: float | None = None
    errors: list[BaseException] = field(default_factory=list)

    def publish(self, item: pytest.Item) -> None:
        """Put what is known on the test's properties, in which it travels to reports, JUnit XML and xdist."""
        prediction = item.stash.get(PREDICTION, None)
        data: dict[str, object] = {
            "devices": [device.label for device in self.devices.values()],
            "peak_bytes": self.peak,
            "limit_bytes": self.need.limit.size if self.need.limit else None,
            "predicted_bytes": prediction.peak if prediction else None,
            "left_bytes": self.left,
            "seconds": self.seconds,
            "skipped": self.reason or None,
            "broken_by": self.broken_by or None,
        }
        item.user_properties[:] = [entry for entry in item.user_properties if entry[0] != GPU_PROPERTY]
        item.user_properties.append((GPU_PROPERTY, json.dumps(data)))
