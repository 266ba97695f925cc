"""CPU time that the installed plugin adds to a pytest session that does not use LoRA.

Makes two virtual environments with the running version of pytest, and installs this package, without what it
depends on, into one of them (pip fetches pytest). Then runs ``pytest --collect-only -q -p no:cacheprovider`` on
an empty test file in both, in turn and in random order. Bytecode is cached, as it is wherever Python may write
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
import venv
from pathlib import Path

import pytest

BUDGET = 1.03
MODULE_BUDGET = 5
REPOSITORY = Path(__file__).resolve().parent.parent
ARGUMENTS = ["--collect-only", "-q", "-p", "no:cacheprovider"]
COUNT = "import sys, pytest; pytest.main(sys.argv[1:]); print('MODULES', *sorted(sys.modules))"


def make_environment(folder: Path, *packages: str) -> str:
    """A virtual environment with pytest and these packages; its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for package in (f"pytest=={pytest.__version__}", *packages):
        options = ["--no-deps"] if package in packages else []
        subprocess.run([python, "-m", "pip", "install", "--quiet", *options, package], check=True)
    return python


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


def measure(rounds: int) -> dict[str, object]:
    """The median ratio, the seconds behind it, and the modules that come with the plugin."""
    with tempfile.TemporaryDirectory() as folder:
        bare = make_environment(Path(folder, "bare"))
        plugin = make_environment(Path(folder, "plugin"), str(REPOSITORY))
        tests = Path(folder, "tests")
        tests.mkdir()
        (tests / "test_empty.py").touch()
        added = sorted(modules(plugin, str(tests)) - modules(bare, str(tests)))
        pairs = []
        for _ in range(rounds + 1):
            seconds = {python: cpu_seconds(python, str(tests)) for python in random.sample([bare, plugin], 2)}
            pairs.append((seconds[plugin], seconds[bare]))
        del pairs[0]  # wrote the bytecode
    ratios = sorted(a / b for a, b in pairs)
    return {
        "rounds": rounds,
        "bare_ms": statistics.median(b for _, b in pairs) * 1e3,
        "plugin_ms": statistics.median(a for a, _ in pairs) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "budget": BUDGET,
        "modules_added": added,
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
    added = result["modules_added"]
    print("| what | CPU time, median | ratio | budget | modules added |\n| --- | --- | --- | --- | --- |")
    print(f"| bare pytest | {result['bare_ms']:.0f} ms | 1 | | |")
    print(
        f"| with the plugin | {result['plugin_ms']:.0f} ms | {result['ratio']:.3f} | {BUDGET} "
        f"| {len(added)} of at most {MODULE_BUDGET}: {', '.join(added)} |"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["ratio"] > BUDGET or len(added) > MODULE_BUDGET)


if __name__ == "__main__":
    sys.exit(main())
