"""Hypothesis as documented: the printed example and the profiles run as they stand, on a slow machine too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.forked import run_forked

PAGE = Path(__file__).parents[2] / "docs" / "property_tests.md"
BASE = """
from transformers import LlamaConfig

my_base = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=128
)
"""
SLOW = """
import functools
import time

import pytest_lora.checks.memory as memory

_check, _calls = memory.check_memory, []


@functools.wraps(_check)
def check_memory(*args, **kwargs):
    _calls.append(None)
    if len(_calls) in (1, 3):
        time.sleep(0.5)
    return _check(*args, **kwargs)


memory.check_memory = check_memory
"""


def first_example() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.lora_slow
def test_the_first_example_runs_as_printed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS")
    pytester.makeconftest(SLOW)
    pytester.makepyfile(BASE + first_example().replace("@settings(", "@settings(max_examples=12, "))
    run_forked(pytester, forget=("hypothesis",)).assert_outcomes(passed=1)


@pytest.mark.lora_slow
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "two workers"])
def test_a_profile_is_there_when_hypothesis_loads_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    pytester.makepyfile(
        """
        from hypothesis import given, settings
        from hypothesis import strategies as st

        @given(st.integers())
        def test_it(number):
            chosen = settings()
            assert (chosen.deadline, chosen.derandomize, chosen.max_examples) == (None, True, 200)
        """
    )
    monkeypatch.delenv("PYTEST_ADDOPTS")  # which leaves Hypothesis and xdist out of sessions inside tests
    result = run_forked(pytester, "--hypothesis-profile=lora-ci", *workers, forget=("hypothesis",))
    result.assert_outcomes(passed=1)
