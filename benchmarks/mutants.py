"""How many small errors in the code the tests notice.

``python benchmarks/mutants.py FOLDER [--number 200] [--seed 0] [--jobs 2] [--json PATH]`` draws mutants by a fixed seed
from the rules, the facts, the inspection and the keeper, changes one operator or one number in each, and runs the tests
that execute its line, the nearest files first, until one fails. Which those are ``benchmarks/executed_lines.py`` has
recorded in the folder; an empty one is filled first, and one of other code is refused. It prints the share that was
killed and every one that survived. The libraries are imported once; each mutant is a forked process in which the one
module is compiled from a changed tree, so that no file is written.

Time is processor time. A mutant that runs out of it is killed only where the same tests without it stay within a fifth
of the limit. At the end every test that killed is run without a mutant: where it fails then too, it has shown nothing.
With ``--json`` an ended run of the same code goes on where it stopped. Who finds that a survivor changes nothing writes
the reason into that file, as ``equivalent``: it counts as survived all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.util
import io
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from chosen_tests import chosen, nearest
from drawn_mutants import PARTS, ROOT, Mutant, drawn
from executed_lines import OPTIONS, Executed, record_all, sources, use_this_code

SET_UP = 30
"""Seconds for imports, collection and fixtures that another test made when the lines were recorded."""

TIMES = 6
"""The limit of a mutant is the set-up and this many times what its tests took when they were recorded."""

WALL = 1800
"""Seconds after which a mutant that waits for ever is ended."""


class _Source(importlib.abc.Loader):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self._mutant.tree, str(ROOT / self._mutant.path), "exec"), vars(module))


class _Finder(importlib.abc.MetaPathFinder):
    """Gives the one module from changed source."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        dotted = mutant.path.removesuffix(".py").replace("/", ".")
        self._package = dotted.endswith(".__init__")
        self._name = dotted.removesuffix(".__init__")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        loader = _Source(self._mutant)
        file = str(ROOT / self._mutant.path)
        locations = [str(Path(file).parent)] if self._package else None
        return importlib.util.spec_from_file_location(
            name, file, loader=loader, submodule_search_locations=locations
        )


class _FirstOfAll(list[Any]):
    """A meta path whose first finder stays the first."""

    def insert(self, index: Any, item: Any) -> None:
        super().insert(max(1, index), item)


class _Only:
    """Runs the given tests alone, in their order, and notes the one that failed."""

    def __init__(self, tests: list[str]) -> None:
        self._place = {test: place for place, test in enumerate(tests)}
        self.failed: list[str] = []
        self.ran = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._place), key=lambda item: self._place[item.nodeid]
        )
        self.ran += len(items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def outcome(mutant: Mutant | None, tests: list[str], every: bool = False) -> dict[str, Any]:
    """What the tests say, in a process of its own; without tests, the whole nearest files are run."""
    import pytest

    if mutant is not None:
        sys.meta_path = _FirstOfAll([_Finder(mutant), *sys.meta_path])
    only = _Only(tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    sessions = [[file] for file in files] if tests else nearest(mutant) if mutant else []
    for arguments in sessions:
        given = [*arguments, *OPTIONS, *([] if every else ["-x"]), "-p", "no:randomly"]
        status = pytest.main(given, plugins=[only] if tests else [])
        if only.failed and not every:
            return {"outcome": "killed", "by": only.failed}
        if not every and status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return {"outcome": "killed", "by": [f"pytest {' '.join(arguments)}: {status!s}"]}
    if only.failed:
        return {"outcome": "killed", "by": only.failed}
    return {"outcome": "survived" if only.ran or not tests else "nothing ran"}


def forked(mutant: Mutant | None, tests: list[str], limit: float, told: Path, every: bool = False) -> int:
    """Start the tests in a forked process.

    Returns:
        Its process id.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgrp()
        signal.alarm(WALL)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = outcome(mutant, tests, every)
        told.write_text(json.dumps(result))
        status = 0
    finally:
        os._exit(status)


def ended(pid: int, status: int, used: resource.struct_rusage, told: Path) -> dict[str, Any]:
    """What a process told, or how it came to an end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what its tests started and left behind
    seconds = round(used.ru_utime + used.ru_stime, 1)
    if told.exists():
        return json.loads(told.read_text()) | {"seconds": seconds}
    signals = (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in signals:
        return {"outcome": "out of time", "seconds": seconds}
    return {"outcome": "killed", "by": [f"the process ended with status {status}"], "seconds": seconds}


def run_all(
    waiting: list[Mutant], executed: Executed, jobs: int, budget: float
) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """The mutants' outcomes, as they come."""
    running: dict[int, tuple[Mutant, list[str], Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mutant in [*waiting, *[None] * jobs]:
            if mutant is not None:
                tests = chosen(mutant, executed, budget)
                told = Path(folder, f"{len(waiting)}-{waiting.index(mutant)}")
                took = sum(executed.seconds[test] for test in tests) if tests else 240
                running[forked(mutant, tests, SET_UP + TIMES * took, told)] = mutant, tests, told
            while len(running) >= jobs or (running and mutant is None):
                pid, status, used = os.wait4(-1, 0)
                if pid in running:
                    done, tests, told = running.pop(pid)
                    result = ended(pid, status, used, told) | {"tests": len(tests)}
                    if result["outcome"] == "out of time":
                        result |= without_it(tests, executed, Path(folder, f"alone-{pid}"))
                    yield done, result


def without_it(tests: list[str], executed: Executed, told: Path) -> dict[str, Any]:
    """Whether running out of time is the mutant's doing: what its tests take without it."""
    limit = SET_UP + TIMES * sum(executed.seconds[test] for test in tests)
    pid = forked(None, tests, limit, told)
    _, status, used = os.wait4(pid, 0)
    alone = ended(pid, status, used, told)
    counted = alone["outcome"] == "survived" and alone["seconds"] < limit / 5
    return {"seconds_without_it": alone["seconds"], "limit": limit, "counts_as_killed": counted}


def failing_anyway(tests: Iterable[str]) -> set[str]:
    """Those of the tests that fail without a mutant."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told")
        pid = forked(None, sorted(tests), 3600, told, every=True)
        _, status, used = os.wait4(pid, 0)
        result = ended(pid, status, used, told)
    if result["outcome"] not in ("survived", "killed"):
        raise RuntimeError(f"the tests that killed could not be run alone: {result}")
    return set(result.get("by", ()))


def killed(result: dict[str, Any]) -> bool:
    return result["outcome"] == "killed" or bool(result.get("counts_as_killed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what executed_lines.py recorded, or where to record it")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--budget", type=float, default=20, help="recorded seconds of the tests of one mutant, at most"
    )
    parser.add_argument(
        "--within", default="", help="only mutants whose path begins so: facts, inspection/state"
    )
    parser.add_argument(
        "--survivors",
        action="store_true",
        help="run what survived again, with the tests of now, and nothing else",
    )
    options = parser.parse_args()
    file: Path | None = options.json and options.json.absolute()
    folder: Path = options.folder.absolute()
    use_this_code()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = earlier(file)
    if not any(folder.glob("*.json")):
        record_all(folder, options.jobs)
    executed = Executed(folder)
    for library in ("accelerate", "bitsandbytes", "hypothesis", "peft", "transformers", "_pytest.pytester"):
        importlib.import_module(library)

    again = {name for name, one in results.items() if not killed(one) and not one.get("equivalent")}
    every = drawn(options.number, options.seed)
    within = [m for m in every if m.path.startswith(f"pytest_lora/{options.within}")]
    waiting = [m for m in within if (str(m) in again if options.survivors else str(m) not in results)]
    for mutant, result in run_all(waiting, executed, options.jobs, options.budget):
        reason = results.get(str(mutant), {}).get("equivalent")
        results[str(mutant)] = result | ({"equivalent": reason} if reason else {})
        print(
            f"{len(results):>4} {result['outcome']:<11} {result['seconds']:6.1f} s {result['tests']:>5}  {mutant}",
            flush=True,
        )
        write(file, options, results)
    idle = failing_anyway({test for one in results.values() for test in one.get("by", ()) if "::" in test})
    for one in results.values():
        if idle.intersection(one.get("by", ())):
            one["outcome"] = "killed by a test that fails anyway"
    write(file, options, results)
    dead = sum(map(killed, results.values()))
    print(f"{dead} of {len(results)} killed: {100 * dead / len(results):.1f} %")


def earlier(file: Path | None) -> dict[str, dict[str, Any]]:
    """The outcomes in a file that an ended run has left, if there is one.

    Raises:
        SystemExit: The file was written for other code.
    """
    if file is None or not file.exists():
        return {}
    written = json.loads(file.read_text())
    if written.get("sources") != sources():
        raise SystemExit(f"{file} is of other code than stands here now: move it away to begin anew")
    found: dict[str, dict[str, Any]] = written["results"]
    return found


def write(file: Path | None, options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    if file is None:
        return
    parts: dict[str, dict[str, int]] = {part: {"killed": 0, "run": 0} for part in PARTS}
    for name, one in results.items():
        of_part = parts[name.split("/")[1]]
        of_part["run"] += 1
        of_part["killed"] += killed(one)
    summary = {
        "sources": sources(),
        "seed": options.seed,
        "drawn": options.number,
        "run": len(results),
        "killed": sum(map(killed, results.values())),
        "of": parts,
    }
    file.write_text(json.dumps(summary | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
