"""CPU time that the installed plugin adds to a pytest session that does not use LoRA.

Makes virtual environments with the running version of pytest, in pairs: without this package, and with it. In the
first pair is what the package depends on, as wherever it can run; there the budget counts. In the second is nothing
else, so that the same costs are compared with less. Then runs ``pytest --collect-only -q -p no:cacheprovider`` on an
empty test file in both of a pair, in turn and in random order. Bytecode is cached, as it is wherever Python may write
it. CPU time is user and system time of the process; the figure is the median of the ratios of the rounds.

    python benchmarks/startup.py [--rounds 25] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

BUDGET = 1.03
MODULE_BUDGET = 5
REPOSITORY = Path(__file__).resolve().parent.parent
ARGUMENTS = ["--collect-only", "-q", "-p", "no:cacheprovider"]
COUNT = "import sys, pytest; pytest.main(sys.argv[1:]); print('MODULES', *sorted(sys.modules))"


def make_pair(folder: Path, *packages: str) -> tuple[str, str]:
    """Two virtual environments with pytest and these packages, one with this package too; their interpreters."""
    pythons = []
    for name in ("bare", "plugin"):
        venv.create(folder / name, with_pip=True)
        python = str(folder / name / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet"]
        wanted = [f"pytest=={pytest.__version__}", *packages]
        subprocess.run([*pip, "-c", str(REPOSITORY / "constraints.txt"), *wanted], check=True)
        if name == "plugin":
            subprocess.run([*pip, "--no-deps", str(REPOSITORY)], check=True)
        pythons.append(python)
    return pythons[0], pythons[1]


def dependencies() -> list[str]:
    """What this package depends on, but for pytest."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [name for name in project["dependencies"] if not name.startswith("pytest")]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}


def cpu_seconds(python: str, folder: str) -> float:
    """User and system time of one session."""
    command = [python, "-m", "pytest", *ARGUMENTS]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"pytest exited with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def modules(python: str, folder: str) -> set[str]:
    """Names of the modules that one session loads."""
    command = [python, "-c", COUNT, *ARGUMENTS]
    result = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=True
    )
    return set(result.stdout.rpartition("MODULES ")[2].split())


def compare(bare: str, plugin: str, tests: str, rounds: int) -> dict[str, object]:
    """The median ratio of a pair of environments, and the milliseconds behind it."""
    pairs = []
    for _ in range(rounds + 1):
        seconds = {python: cpu_seconds(python, tests) for python in random.sample([bare, plugin], 2)}
        pairs.append((seconds[plugin], seconds[bare]))
    del pairs[0]  # wrote the bytecode
    ratios = sorted(a / b for a, b in pairs)
    return {
        "bare_ms": statistics.median(b for _, b in pairs) * 1e3,
        "plugin_ms": statistics.median(a for a, _ in pairs) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def measure(rounds: int) -> dict[str, Any]:
    """Both pairs of environments, and the modules that come with the plugin."""
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder, "tests")
        tests.mkdir()
        (tests / "test_empty.py").touch()
        with_dependencies = make_pair(Path(folder, "with_dependencies"), *dependencies())
        alone = make_pair(Path(folder, "alone"))
        bare, plugin = (modules(python, str(tests)) for python in with_dependencies)
        return {
            "rounds": rounds,
            "budget": BUDGET,
            "modules_added": sorted(plugin - bare),
            "with_dependencies": compare(*with_dependencies, str(tests), rounds),
            "pytest_alone": compare(*alone, str(tests), rounds),
        }


def main() -> int:
    """Measure, print a table, and say by the exit status whether the budgets hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    result = measure(options.rounds)
    print("| in an environment with | bare pytest | with the plugin | ratio | budget |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for key, words, budget in (
        ("with_dependencies", "what the plugin depends on", str(BUDGET)),
        ("pytest_alone", "pytest alone", ""),
    ):
        row = result[key]
        print(
            f"| {words} | {row['bare_ms']:.0f} ms | {row['plugin_ms']:.0f} ms | {row['ratio']:.3f} | {budget} |"
        )
    added = result["modules_added"]
    print(f"\nmodules added: {len(added)} of at most {MODULE_BUDGET}: {', '.join(added)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["with_dependencies"]["ratio"] > BUDGET or len(added) > MODULE_BUDGET)


if __name__ == "__main__":
    sys.exit(main())
