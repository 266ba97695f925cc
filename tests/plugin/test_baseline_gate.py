"""``--lora-baseline`` and ``--lora-update-baseline`` as a user meets them, plain and under xdist."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pytest_lora.plugin import baseline_gate as baseline_gate

# Sessions in this process take modules out of sys.modules again, all but those that are there before.
from pytest_lora.report.baseline import to_json
from tests.forked import run_forked

TESTS = """
import os
import pytest
from pytest_lora.assertions import demand
from pytest_lora.findings import Finding, Report

NOW = eval(os.environ.get("NOW", "{}"))

def adapter(trainable, scaling):
    scalings = {"scaling of q_proj in default": 2.0}
    if scaling != 2.0:
        scalings = {"scaling of q_proj in default, smallest": scaling, "scaling of q_proj in default, largest": 2.0}
    return tuple({"trainable parameters with default": trainable, **scalings}.items())

def test_adapter():
    codes = NOW.get("codes", ["LORA107"])
    found = tuple(Finding(code, "a_rule", "warning", "here", "a", "b", "c") for code in codes)
    demand(Report("model", found, (), adapter(NOW.get("trainable", 64), NOW.get("scaling", 2.0))))

def test_loss():
    after = NOW.get("after", 1.0)
    demand(Report("loss", (), (), (("loss drop within 20 steps", (2.0 - after) / 2.0),)))

def test_memory():
    if NOW.get("measures", True):
        peak = NOW.get("peak", 1_000_000)
        demand(Report("memory", (), (), (("predicted peak", peak),)))

def test_of_something_else(): ...
"""

XDIST = pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["plain", "xdist"])
GATE = "--lora-baseline=baseline.json"
WARN = ("-W", "default::pytest_lora.LoraHealthWarning")
"""The session of this test makes errors of these warnings, in its whole process."""


MEASURED = {
    "test_it.py::test_adapter": {
        "findings": ("LORA107",),
        "scaling of q_proj in default": 2.0,
        "trainable parameters with default": 64,
    },
    "test_it.py::test_loss": {"findings": (), "loss drop within 20 steps": 0.5},
    "test_it.py::test_memory": {"findings": (), "predicted peak": 1_000_000},
}


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(test_it=TESTS)
    (pytester.path / "baseline.json").write_text(to_json(MEASURED))
    return pytester


def section(lines: list[str]) -> list[str]:
    start = next(i for i, line in enumerate(lines) if " LoRA baseline " in line)
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("="))
    return lines[start + 1 : end]


def test_nothing_moved(suite: pytest.Pytester) -> None:
    result = suite.runpytest_inprocess(*WARN, GATE)
    assert result.ret == 0
    path = suite.path / "baseline.json"
    assert section(result.outlines) == [f"7 quantities of 3 tests beside {path}: 7 same"]


@XDIST
def test_regressions_fail_the_session_side_by_side(
    suite: pytest.Pytester, workers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "NOW", "dict(codes=['LORA107', 'LORA109'], trainable=128, scaling=1.0, after=1.8, peak=1_100_000)"
    )
    result = run_forked(suite, GATE, *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=4, warnings=2)
    path = suite.path / "baseline.json"
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in section(result.outlines)]
    assert rows == [
        ["test", "quantity", "baseline", "now", "tolerance", "verdict"],
        ["test_it.py::test_adapter", "findings", "LORA107", "LORA107 LORA109", "exact", "regression"],
        ["scaling of q_proj in default", "2", "-", "0.0001 %", "regression"],
        ["scaling of q_proj in default, largest", "-", "2", "0.0001 %", "new"],
        ["scaling of q_proj in default, smallest", "-", "1", "0.0001 %", "new"],
        ["trainable parameters with default", "64", "128", "exact", "regression"],
        ["test_it.py::test_loss", "loss drop within 20 steps", "0.5", "0.1", "10 % or 0.01", "regression"],
        ["test_it.py::test_memory", "predicted peak", "1,000,000", "1,100,000", "2 %", "regression"],
        [f"9 quantities of 3 tests beside {path}: 2 new, 5 regression, 2 same"],
        [
            "FAILED: 5 quantities have regressed; if this is meant, --lora-update-baseline writes it to the file"
        ],
    ]


def test_better_is_no_regression(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOW", "dict(codes=[], after=0.5, peak=500_000)")
    result = suite.runpytest_inprocess(*WARN, GATE)
    assert result.ret == 0
    assert section(result.outlines)[-1].endswith(
        "beside " + str(suite.path / "baseline.json") + ": 3 improved, 4 same"
    )


def test_a_test_that_measures_no_more_is_a_regression(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOW", "dict(measures=False)")
    result = suite.runpytest_inprocess(*WARN, GATE)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["* predicted peak  1,000,000  -  * regression"])


def test_a_part_of_the_tests_compares_and_updates_that_part(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite.path / "baseline.json"
    before = json.loads(path.read_text())["tests"]
    monkeypatch.setenv("NOW", "dict(peak=900_000, trainable=1)")
    result = suite.runpytest_inprocess(*WARN, GATE, "-k", "test_memory")
    assert result.ret == 0
    assert section(result.outlines)[-1] == f"2 quantities of 1 tests beside {path}: 1 improved, 1 same"
    result = suite.runpytest_inprocess(*WARN, GATE, "--lora-update-baseline", "-k", "test_memory")
    assert section(result.outlines) == [
        "test_it.py::test_memory  predicted peak: 1,000,000 -> 900,000",
        f"written to {path}",
    ]
    after = json.loads(path.read_text())["tests"]
    assert after.pop("test_it.py::test_memory") == {"findings": [], "predicted peak": 900_000}
    assert after == {test: found for test, found in before.items() if test in after}
    assert len(after) == 2


def test_the_file_does_not_depend_on_order_or_workers(suite: pytest.Pytester) -> None:
    path = suite.path / "baseline.json"
    before = path.read_bytes()
    path.unlink()
    names = [f"test_it.py::{name}" for name in ("test_memory", "test_loss", "test_adapter")]
    run_forked(suite, GATE, "--lora-update-baseline", "-n", "2", *names)
    assert path.read_bytes() == before
    result = suite.runpytest_inprocess(*WARN, GATE, "--lora-update-baseline")
    assert section(result.outlines) == ["nothing changed", f"{path} stays as it is"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (None, [GATE], "--lora-baseline: there is no {path}; --lora-update-baseline writes it"),
        ("{", [GATE], "--lora-baseline: {path} is no JSON *; restore it, or delete it and write it anew *"),
        (
            "{}",
            [GATE, "--lora-update-baseline"],
            "--lora-baseline: {path} is no baseline of pytest-lora; name another *",
        ),
        (
            '{"pytest-lora baseline": 2}',
            [GATE],
            "--lora-baseline: {path} has version 2, and this pytest-lora reads 1; delete it and write it anew with *",
        ),
        (
            None,
            ["--lora-update-baseline"],
            "--lora-update-baseline: say which file, with --lora-baseline FILE",
        ),
        (None, ["--lora-baseline=."], "--lora-baseline: '.' must be a file in a folder that exists"),
        (
            None,
            ["--lora-baseline=no/b.json"],
            "--lora-baseline: 'no/b.json' must be a file in a folder that exists",
        ),
    ],
)
def test_a_bad_file_is_a_usage_error(
    pytester: pytest.Pytester, content: str | None, args: list[str], message: str
) -> None:
    path: Path = pytester.path / "baseline.json"
    if content is not None:
        path.write_text(content)
    pytester.makepyfile(test_it="def test_it(): ...")
    result = pytester.runpytest_inprocess(*args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message.format(path=path)}"])
    assert (path.read_text() if content is not None else None) == content


MANY_CHECKS = """
from peft import LoraConfig
from pytest_lora import assert_config_healthy
from transformers import LlamaConfig

BASE = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=64, vocab_size=64)

def test_many():
    for rank in (RANK, *[4] * 25):
        assert_config_healthy(LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["q_proj"]), BASE)
"""


@pytest.mark.parametrize(
    ("rank", "alpha", "quantity"),
    [
        ("3", "8", "trainable parameters with default"),
        ("2", "8 + 1e-4", "scaling of self_attn.q_proj in default"),
    ],
)
def test_the_first_of_many_checks_counts_to_the_last_digit(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, rank: str, alpha: str, quantity: str
) -> None:
    # Files of one size, written within one second, are the same to a cache of bytecode.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def session(rank: str, alpha: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=MANY_CHECKS.replace("RANK", rank).replace("ALPHA", alpha))
        return pytester.runpytest_inprocess(*WARN, GATE, *arguments)

    session("2", "8", "--lora-update-baseline")
    assert session("2", "8").ret == 0
    result = session(rank, alpha)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*{quantity} * regression"])
