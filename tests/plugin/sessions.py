"""Sessions of pytest that a test starts in its own process, at a tenth of what another process costs."""

from __future__ import annotations

import gc
import shlex
from pathlib import Path

import pytest

from tests.forked import run_forked

LEFT_OUT = ("-p", "no:xdist", "-p", "no:cacheprovider")
"""Plugins that have no part in these tests."""
OWN_FILTERS = ("-W", "default::pytest_lora.LoraHealthWarning")
"""Takes back what the settings of this repository make of warnings."""


MODES = pytest.mark.parametrize("mode", ["plain", "xdist"])


def session(pytester: pytest.Pytester, mode: str, *args: str, workers: int = 1) -> pytest.RunResult:
    """Run pytest as it stands, in this process, or with workers of pytest-xdist."""
    if mode == "plain":
        return run(pytester, *args)
    return run_forked(pytester, "-n", str(workers), *args)


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run pytest in this process; for tests that say nothing about imports, workers or the end of a process."""
    gc.collect()
    gc.freeze()  # what lives here is nothing that a GPU test of the session could leave, and is not looked at again
    return pytester.runpytest_inprocess(*LEFT_OUT, *OWN_FILTERS, *args)


WORKFLOW = Path(__file__).parents[2] / "examples" / "ci" / "github-actions.yml"


def example_command() -> list[str]:
    """The arguments of pytest in the GPU job of the example workflow, without those of pytest-timeout."""
    (line,) = [step for step in WORKFLOW.read_text().split("- run: ") if "--lora-require-gpu --" in step]
    words = shlex.split(line.partition("pytest ")[2].partition("- uses")[0])
    at = words.index("--timeout")
    return words[:at] + words[at + 2 :]
