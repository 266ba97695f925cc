"""What is said of GPU tests, in a terminal as in Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from pytest_lora.facts.numbers import format_bytes
from pytest_lora.report.session import GpuUse

COLUMNS = ("test", "devices", "peak", "limit", "predicted", "seconds")
TEXT_COLUMNS = 2
"""Those of them that are no numbers."""

NONE = "-"


def ran(uses: Mapping[str, GpuUse]) -> dict[str, GpuUse]:
    """The tests that ran on a GPU."""
    return {test: use for test, use in uses.items() if not use.skipped and use.devices}


def skipped(uses: Mapping[str, GpuUse]) -> dict[str, list[str]]:
    """The tests that did not run, by why."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for test, use in uses.items():
        if use.skipped:
            groups[use.skipped].append(test)
    return groups


def cells(test: str, use: GpuUse) -> tuple[str, ...]:
    """The columns of a test that ran, a dash where nothing is known."""
    return (
        test,
        ", ".join(use.devices),
        *(
            NONE if size is None else format_bytes(size)
            for size in (use.peak_bytes, use.limit_bytes, use.predicted_bytes)
        ),
        NONE if use.seconds is None else f"{use.seconds:.2f}",
    )


def troubles(uses: Mapping[str, GpuUse]) -> Iterator[str]:
    """Yield what no single test shows: memory left behind, and tests that could not run as CUDA was broken."""
    for test, use in uses.items():
        if use.left_bytes:
            where = ", ".join(use.devices)
            yield f"{test} left {format_bytes(use.left_bytes)} ({use.left_bytes} bytes) allocated on {where}"
    broken = Counter(use.broken_by for use in uses.values() if use.broken_by)
    for test, number in broken.items():
        were = "1 GPU test was" if number == 1 else f"{number} GPU tests were"
        yield f"{test} broke CUDA: {were} not run after it in that process"
