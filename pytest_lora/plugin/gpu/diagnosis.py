"""What is said of a test that took too much memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_lora.facts.numbers import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_lora.plugin.gpu.hardware import Device
    from pytest_lora.plugin.gpu.marks import Limit

LESS = (
    "smaller batches, shorter sequences, gradient checkpointing or a base in 4 bits take less; the rank of the adapter "
    "hardly matters"
)


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
