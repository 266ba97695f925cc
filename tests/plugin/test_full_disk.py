"""A session that cannot write a file says so in a line, and fails only where the file was asked for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plugin.sessions import run


@pytest.fixture
def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = os.replace

    def full(source: str, target: Any) -> None:
        if Path(source).suffix == ".tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)


HEALTHY = """
def test_it(lora_model):
    from pytest_lora import assert_lora_healthy
    assert_lora_healthy(lora_model)
"""


@pytest.mark.usefixtures("_full_disk")
def test_a_baseline_on_a_full_disk_is_kept_and_named(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=HEALTHY)
    baseline = pytester.path / "baseline.json"
    result = run(pytester, "--lora-baseline", "baseline.json", "--lora-update-baseline")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["ERROR: *baseline.json is not written, and as it was before: *No space left on device*"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    assert not baseline.exists()
    assert not list(pytester.path.glob(".baseline*"))


@pytest.mark.usefixtures("_full_disk")
def test_a_report_on_a_full_disk_is_named_and_a_summary_turns_nothing_red(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path))  # a folder, which cannot be written
    pytester.makepyfile(test_it=HEALTHY)
    result = run(pytester, "--lora-report=out.md")
    assert not (pytester.path / "out.md").exists()
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.fnmatch_lines(["LoRA: the job summary is not written: *"])
    assert run(pytester).ret == 0
