"""Sessions of pytest that a test starts in its own process, at a tenth of what another process costs."""

from __future__ import annotations

import importlib

import pytest

LEFT_OUT = ("-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:cacheprovider")
"""Plugins that have no part in these tests."""
OWN_FILTERS = ("-W", "default::pytest_lora.LoraHealthWarning")
"""Takes back what the settings of this repository make of warnings."""


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run pytest in this process; for tests that say nothing about imports, workers or the end of a process."""
    # The session drops the modules that it has loaded, and torch cannot be loaded twice.
    importlib.import_module("torch")
    return pytester.runpytest_inprocess(*LEFT_OUT, *OWN_FILTERS, *args)
