"""Set-up of the fixture ``lora_model``, alone and with its teardown, against building and quantizing the base anew.

One pytest session repeats a turn: a test that builds the base, one that takes ``lora_model`` right after that,
a few more in a row that take it, as in most suites, and one that takes nothing. All are empty otherwise. The
times are those of the phases of the tests, less those of the test that takes nothing; the figures are medians of
the ratios of the turns. The first turns, in which libraries load and the base is built, are left out. The budget is
one of set-up; the teardown, which finds damage and puts the base back, is shown with it.

The ratios are of CPU time, all threads together: on a machine that others use, a phase of milliseconds is at times
ten times as long by the clock on the wall, which is in the JSON too.

    python benchmarks/lora_model_setup.py [--rounds 20] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

BUDGET = 1 / 20
WARM_UP = 3

TESTS = """
import torch
from pytest_lora.bases.tiny import load_tiny

torch.set_num_threads(1)  # on a busy machine threads wait for each other, which makes building look slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""

TURN = """
def test_{turn}_builds(): load_tiny(device=DEVICE)
def test_{turn}_after_a_build(lora_model): ...
def test_{turn}_in_a_row(lora_model): ...
def test_{turn}_in_a_row_2(lora_model): ...
def test_{turn}_takes_nothing(): ...
"""


KINDS = {"in_a_row": "in a row", "after_a_build": "right after a build, with cold caches"}
PHASES = {"setup": ("setup",), "both": ("setup", "teardown")}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


class Times:
    """Seconds by clock, kind of test and phase, one entry a turn."""

    def __init__(self) -> None:
        self.seconds: dict[str, defaultdict[str, defaultdict[str, list[float]]]] = {
            clock: defaultdict(lambda: defaultdict(list)) for clock in CLOCKS
        }

    def _timed(self, item: pytest.Item, phase: str) -> Generator[None, None, None]:
        kind = item.name.split("_", 2)[2]
        before = {clock: now() for clock, now in CLOCKS.items()}
        try:
            yield
        finally:
            for clock, now in CLOCKS.items():
                self.seconds[clock][kind][phase].append(now() - before[clock])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._timed(item, "setup")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._timed(item, "call")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._timed(item, "teardown")


def measure(rounds: int) -> dict[str, float]:
    """Medians over the turns, in milliseconds, and of their ratios, by both clocks."""
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "test_turns.py")
        turns = (TURN.format(turn=turn) for turn in range(rounds + WARM_UP))
        file.write_text("\n".join([TESTS, *turns]))
        status = pytest.main([str(file), "-q", "-p", "no:cacheprovider", f"--rootdir={folder}"], [times])
    if status:
        raise RuntimeError(f"the measured tests did not pass: {status!r}")

    result: dict[str, float] = {"rounds": rounds, "budget": BUDGET}
    for clock, seconds in times.seconds.items():
        result |= {f"{name}_{clock}": value for name, value in figures(seconds).items()}
    return result


def figures(seconds: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
    """Medians over the turns in milliseconds, and of the ratios, by one clock."""

    def of(kind: str, phases: tuple[str, ...]) -> list[float]:
        return [sum(turn) for turn in zip(*(seconds[kind][phase] for phase in phases), strict=True)][WARM_UP:]

    build = seconds["builds"]["call"][WARM_UP:]
    result = {"build_ms": statistics.median(build) * 1e3}
    for kind in KINDS:
        for what, phases in PHASES.items():
            empty = statistics.median(of("takes_nothing", phases))
            fixture = [time - empty for time in of(kind, phases)]
            result[f"{kind}_{what}_ms"] = statistics.median(fixture) * 1e3
            result[f"{kind}_{what}_ratio"] = statistics.median(
                a / b for a, b in zip(fixture, build, strict=True)
            )
    return result


def main() -> int:
    """Measure, print a table, and say by the exit status whether the budget holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    result = measure(options.rounds)
    print("| what | CPU time, median | ratio | budget |\n| --- | --- | --- | --- |")
    print(f"| build and quantize the base | {result['build_ms_cpu']:.0f} ms | 1 | |")
    for kind, when in KINDS.items():
        for what, phases in PHASES.items():
            print(
                f"| `lora_model`, {' and '.join(phases)}, {when} | {result[f'{kind}_{what}_ms_cpu']:.1f} ms "
                f"| {result[f'{kind}_{what}_ratio_cpu']:.3f} | {f'{BUDGET:.3f}' if what == 'setup' else ''} |"
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(max(result[f"{kind}_setup_ratio_cpu"] for kind in KINDS) > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
