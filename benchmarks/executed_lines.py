"""Which tests execute which lines of the package, and how long each takes: what ``benchmarks/mutants.py`` chooses by.

``python benchmarks/executed_lines.py FOLDER TESTS...`` runs the tests in this process and adds what they executed to
the folder. Several runs may share one folder. It needs coverage.py (``pip install -e '.[test,bench]'``). Lines that run
in another process are not seen; tests that failed or were skipped are left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parents[1]
QUIET = (
    "-q",
    "--no-header",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-p",
    "no:html",
    "--hypothesis-seed=0",
)


class Recorder:
    """Tells coverage.py which test is running, and notes the processor time of those that pass."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._measured = measured
        self._failed: set[str] = set()
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._measured.switch_context(item.nodeid)
        begun = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - begun
        self._measured.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self._failed.add(report.nodeid)

    def passed(self) -> dict[str, float]:
        return {test: took for test, took in self.seconds.items() if test not in self._failed}


def record(folder: Path, tests: list[str]) -> None:
    """Run the tests and add their lines and seconds to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{os.getpid()}-{time.time_ns()}"
    measured = coverage.Coverage(
        data_file=str(folder / f"{name}.coverage"), config_file=False, source=[str(ROOT / "pytest_lora")]
    )
    recorder = Recorder(measured)
    measured.start()
    pytest.main([*tests, *QUIET], plugins=[recorder])
    measured.stop()
    measured.save()
    (folder / f"{name}.json").write_text(json.dumps(recorder.passed()))


class Executed:
    """What was recorded in a folder."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, float] = {}
        self._data = []
        self._known: dict[str, dict[int, set[str]]] = {}
        for file in sorted(folder.glob("*.json")):
            self.seconds |= json.loads(file.read_text())
            data = coverage.CoverageData(str(file.with_suffix(".coverage")))
            data.read()
            self._data.append(data)

    def by_line(self, path: str) -> dict[int, set[str]]:
        """The tests that execute each line of a module, given by its path from the root."""
        if path in self._known:
            return self._known[path]
        found = self._known[path] = defaultdict(set)
        for data in self._data:
            for line, tests in data.contexts_by_lineno(str(ROOT / path)).items():
                found[line].update(test for test in tests if test in self.seconds)
        return found


if __name__ == "__main__":
    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    record(Path(sys.argv[1]), sys.argv[2:])
