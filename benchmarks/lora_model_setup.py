"""Set-up and teardown of the fixture ``lora_model`` against building and quantizing the base anew.

One pytest session runs three kinds of tests in turn: an empty one that takes ``lora_model``, an empty one that
takes nothing, and one that builds the base. pytest's own reports give the times. Only the first few tests of
each kind, in which libraries load and the base is built, are left out.

    python benchmarks/lora_model_setup.py [--rounds 20] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

BUDGET = 1 / 20
WARM_UP = 3

TESTS = """
import pytest

@pytest.mark.parametrize("turn", range({rounds}))
class TestTurns:
    def test_takes_lora_model(self, lora_model, turn): ...

    def test_takes_nothing(self, turn): ...

    def test_builds_the_base(self, lora_device, turn):
        from pytest_lora.tiny import load_tiny

        load_tiny(device=lora_device)
"""


class Times:
    """Seconds by kind of test and phase, one entry a turn."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.callspec.params["turn"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            raise RuntimeError(report.longreprtext)
        kind = report.nodeid.rsplit("::", 1)[-1].partition("[")[0]
        self.seconds[kind][report.when].append(report.duration)


def measure(rounds: int) -> dict[str, float]:
    """Medians over the turns, in milliseconds, and their ratio."""
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "test_turns.py")
        file.write_text(TESTS.format(rounds=rounds + WARM_UP))
        status = pytest.main([str(file), "-q", "-p", "no:cacheprovider", f"--rootdir={folder}"], [times])
    if status:
        raise RuntimeError(f"the measured tests did not pass: {status!r}")

    def fixture_cost(kind: str) -> list[float]:
        phases = times.seconds[kind]
        return [a + b for a, b in zip(phases["setup"], phases["teardown"], strict=True)][WARM_UP:]

    empty = statistics.median(fixture_cost("test_takes_nothing"))
    fixture = statistics.median(fixture_cost("test_takes_lora_model")) - empty
    build = statistics.median(times.seconds["test_builds_the_base"]["call"][WARM_UP:])
    return {
        "rounds": rounds,
        "lora_model_ms": fixture * 1e3,
        "build_ms": build * 1e3,
        "ratio": fixture / build,
        "budget": BUDGET,
    }


def main() -> int:
    """Measure, print a table, and say by the exit status whether the budget holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    result = measure(options.rounds)
    print("| what | median | ratio | budget |\n| --- | --- | --- | --- |")
    print(f"| build and quantize the base | {result['build_ms']:.0f} ms | 1 | |")
    print(
        f"| `lora_model`, set-up and teardown | {result['lora_model_ms']:.1f} ms "
        f"| {result['ratio']:.3f} | {BUDGET:.3f} |"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["ratio"] > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
