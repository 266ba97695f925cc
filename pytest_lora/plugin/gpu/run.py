"""One GPU test: what is known of it while it runs, how that travels, and what is said where it takes too much."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.facts.numbers import format_bytes
from pytest_lora.plugin.gpu.marks import Need
from pytest_lora.plugin.options import GPU_PROPERTY, is_recorded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_lora.facts.memory import MemoryEstimate
    from pytest_lora.findings import Report
    from pytest_lora.plugin.gpu.hardware import Device
    from pytest_lora.plugin.gpu.marks import Limit

LESS = (
    "smaller batches, shorter sequences, gradient checkpointing or a base in 4 bits take less; the rank of the adapter "
    "hardly matters"
)


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
        item.user_properties[:] = [one for one in item.user_properties if not is_recorded(one, GPU_PROPERTY)]
        item.user_properties.append((GPU_PROPERTY, json.dumps(data)))


def predict(item: pytest.Item) -> None:
    """Leave a prediction in the test's stash, unless somebody else has or nothing is known."""
    if PREDICTION in item.stash:
        return
    estimate = _estimated(item)
    if estimate is not None:
        item.stash[PREDICTION] = Prediction(estimate.peak_allocated, dict(estimate.breakdown))


def explained(item: pytest.Item, budget: int) -> str:
    """The estimate of a test that ran out of memory, and what would fit ``budget`` bytes; empty if unknown."""
    estimate = _estimated(item)
    if estimate is None:
        return ""
    from pytest_lora.checks.memory import judge_memory

    model, _ = _known(item)
    report: Report = judge_memory(model, estimate, budget)
    return "\n".join((str(estimate), *(str(finding) for finding in report.errors)))


def _estimated(item: pytest.Item) -> MemoryEstimate | None:
    """What is wrong with the estimate is not what is wrong with the test, and neither is what a fixture raises here."""
    try:
        model, batch = _known(item)
        if model is None or batch is None:
            return None
        from pytest_lora.memory.estimate import estimate_of_model

        return estimate_of_model(model, batch)
    except Exception:
        return None


def _known(item: pytest.Item) -> tuple[Any, Any]:
    """The first fixture value that is a model with an adapter, and the first that is a batch."""
    values = list(getattr(item, "funcargs", {}).values())
    model = next((v for v in values if hasattr(v, "peft_config") and hasattr(v, "parameters")), None)
    batch = next((v for v in values if isinstance(v, Mapping) and "input_ids" in v), None)
    return model, batch


def over_limit(
    peak: int, limit: Limit, devices: Sequence[Device], before: int, breakdown: Mapping[str, int]
) -> str:
    """The failure of a test over its limit; sizes in bytes, ``breakdown`` from an estimate or empty."""
    where = " or ".join(device.label for device in devices)
    lines = [
        f"peak memory of {format_bytes(peak)} on {where} is over the limit of {format_bytes(limit.size)}, "
        f"by {limit.text}"
    ]
    if before:
        lines.append(f"  allocated before the test  {format_bytes(before)}")
    if breakdown:
        lines.append("the estimate of this test's peak:")
        width = max(map(len, breakdown))
        lines += [f"  {part:<{width}}  {format_bytes(size)}" for part, size in breakdown.items()]
    return "\n".join(lines)


def out_of_memory(
    devices: Mapping[int, Device],
    before: int,
    peak: int | None,
    taken: Mapping[int, int | None],
    declared: int | None,
    left: Mapping[str, int],
) -> str:
    """What is known of an out-of-memory error, and what to do; sizes in bytes.

    Args:
        devices: Those of the test, by torch's numbers.
        before: Allocated when it began.
        peak: The most that it had allocated; ``None`` if unknown.
        taken: What all processes take of each device now; ``None`` if unknown.
        declared: ``min_vram_gb`` of the test; ``None`` if not said.
        left: What earlier tests left allocated, by test.
    """
    names = ", ".join(f"{d.label} ({d.name}, {format_bytes(d.total)})" for d in devices.values())
    lines = [f"out of memory on {names}", f"  allocated before the test        {format_bytes(before)}"]
    lines += [f"    left by {test}: {format_bytes(size)}" for test, size in left.items()]
    if peak is not None:
        lines.append(f"  peak of the test                 {format_bytes(peak)}")
    for number, device in devices.items():
        size = taken.get(number)
        if size is not None:
            lines.append(f"  taken of {device.label} by all processes {format_bytes(size)}")
    smallest = min(device.total for device in devices.values())
    lines.append(f"fix: {_advice(smallest, before, peak, declared, bool(left))}")
    return "\n".join(lines)


def _advice(total: int, before: int, peak: int | None, declared: int | None, is_left: bool) -> str:
    if before > total / 4:
        whose = "what the tests named above left" if is_left else "what fixtures of wider scope hold"
        return f"free {whose}: {format_bytes(before)} were taken before this test began"
    if peak is not None and (declared or 0) < peak:
        least = math.ceil(peak / 10**9) + 1
        return f"{LESS}; if it needs this much, @pytest.mark.lora_gpu(min_vram_gb={least}) skips it on smaller devices"
    return LESS
