"""Which tests execute which lines of the package, and how long each takes: what ``benchmarks/mutants.py`` chooses by.

``python benchmarks/executed_lines.py FOLDER [TESTS...] [--jobs 2]`` runs the tests, without any given those that judge
rules, facts and inspection in their own process, and adds what they executed to the folder. It needs coverage.py
(``pip install -e '.[test,bench]'``). Lines that run in another process are not seen; tests that failed or were skipped
are left out. A recording holds for the code it was made with: a folder in which one part is of other code is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "-q",
    "--lora-slow",
    "--no-header",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-p",
    "no:html",
    "--hypothesis-seed=0",
)


ELSEWHERE = ("tests/plugin", "tests/docs", "tests/gpu", "tests/report/test_browser.py")
"""Tests of sessions, pages and devices: what they judge they judge in another process, or not on this machine."""


def sources() -> str:
    """What the package's code is now, in one short text."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "pytest_lora").rglob("*.py")):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def use_this_code() -> None:
    """Import the package from here, in this process and in those that it starts, wherever it is installed from."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["HF_HUB_OFFLINE"] = "1"


def judging() -> list[str]:
    """The files of tests that are recorded where none are named."""
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_*.py"))]
    return [file for file in files if not file.startswith(ELSEWHERE)]


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
    """Run the tests in this process and add their lines and seconds to the folder.

    Raises:
        SystemExit: They could not all be collected and run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = sources()
    name = f"{os.getpid()}-{time.time_ns()}"
    measured = coverage.Coverage(
        data_file=str(folder / f"{name}.coverage"), config_file=False, source=[str(ROOT / "pytest_lora")]
    )
    measured.set_option("run:relative_files", True)
    recorder = Recorder(measured)
    measured.start()
    status = pytest.main([*tests, *OPTIONS], plugins=[recorder])
    measured.stop()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {status!s}: the tests are not all recorded")
    measured.save()
    (folder / f"{name}.json").write_text(json.dumps({"sources": code, "seconds": recorder.passed()}))


def record_all(folder: Path, jobs: int) -> None:
    """Run the tests that judge, in so many processes, and record them in the folder once all have come to an end.

    Raises:
        SystemExit: One of the processes failed.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shares = [judging()[start::jobs] for start in range(jobs)]
    parts = [subprocess.Popen([sys.executable, __file__, str(unfinished), *share]) for share in shares]
    statuses = [part.wait() for part in parts]
    if any(statuses):
        raise SystemExit("a process that records failed")
    unfinished.rename(folder)


class Executed:
    """What was recorded in a folder.

    Raises:
        SystemExit: Where nothing was recorded there, or a part of it with other code than stands here now.
    """

    def __init__(self, folder: Path) -> None:
        code, files = sources(), sorted(folder.glob("*.json"))
        if not files:
            raise SystemExit(
                f"{folder} holds no recording: make one with benchmarks/executed_lines.py {folder}"
            )
        self.seconds: dict[str, float] = {}
        self._data = []
        self._known: dict[str, dict[int, set[str]]] = {}
        for file in files:
            recorded = json.loads(file.read_text())
            if recorded["sources"] != code:
                raise SystemExit(
                    f"{file} was recorded with other code than stands here now: the lines have moved. "
                    "Record into a new folder."
                )
            self.seconds |= recorded["seconds"]
            data = coverage.CoverageData(str(file.with_suffix(".coverage")))
            data.read()
            self._data.append(data)

    def by_line(self, path: str) -> dict[int, set[str]]:
        """The tests that execute each line of a module, given by its path from the root."""
        if path in self._known:
            return self._known[path]
        found = self._known[path] = defaultdict(set)
        for data in self._data:
            for line, tests in data.contexts_by_lineno(path).items():
                found[line].update(test for test in tests if test in self.seconds)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", nargs="*", help="files or folders of tests")
    parser.add_argument("--jobs", type=int, default=2, help="processes, where no tests are named")
    options = parser.parse_args()
    folder = options.folder.absolute()
    use_this_code()
    if options.tests:
        record(folder, options.tests)
        return
    record_all(folder, options.jobs)


if __name__ == "__main__":
    main()
