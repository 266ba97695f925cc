"""What is meant is refused where it contradicts itself, by the names of the fields."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig

from pytest_lora import Expect

ORDER = (
    ("min_scaling", "low_scaling"),
    ("min_scaling", "max_scaling"),
    ("min_scaling", "max_scaling_rslora"),
    ("low_scaling", "max_scaling"),
    ("low_scaling", "max_scaling_rslora"),
)
NAMES = ("min_scaling", "low_scaling", "max_scaling", "max_scaling_rslora")


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(0, 100)))
def test_thresholds_between_which_nothing_is_left_are_refused_and_no_others(given: dict[str, float]) -> None:
    defaults = Expect()
    held = {name: given.get(name, getattr(defaults, name)) for name in NAMES}
    wrong = [pair for pair in ORDER if held[pair[0]] > held[pair[1]]]
    if not wrong:
        assert {name: getattr(Expect(**given), name) for name in NAMES} == held
        return
    with pytest.raises(ValueError, match=r"^\w+ must not be above \w+, but ") as raised:
        Expect(**given)
    assert re.findall(r"^(\w+) must not be above (\w+)", str(raised.value))[0] in wrong


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_scaling": 40}, "min_scaling must not be above low_scaling"),
        ({"max_dropout": 2}, "max_dropout must be a finite number at least 0 and at most 1, not 2"),
        ({"max_dropout": None}, "max_dropout must be a number, not None"),
        ({"config": LoraConfig}, "config must be a LoraConfig, not <class .*; make one: LoraConfig"),
        ({"config": IA3Config(target_modules=["x"])}, "config must be a LoraConfig, not IA3Config"),
        ({"param_ratio": (0.1, 2)}, "param_ratio must be a finite number at least 0 and at most 1, not 2"),
        ({"param_ratio": (0.5, 0.1)}, r"param_ratio must be \(low, high\) with low <= high"),
        ({"advised_percent": (0, 200)}, "advised_percent must be a finite number at least 0 and at most 100"),
        ({"advised_percent": None}, r"advised_percent must be a pair \(low, high\), not None"),
        ({"pretrained_head": None}, "pretrained_head must be True or False, not None"),
        ({"new_tokens": 10**400}, "new_tokens must be at most .* not a whole number of about 401 digits"),
        ({"alpha_ratio": 10**400}, "alpha_ratio must be a finite number, not a whole number of about 401"),
        ({"purpose": "training"}, "purpose must be one of train, eval, inference, not 'training'.*'train'"),
    ],
)
def test_what_no_setup_can_meet_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{named}"):
        Expect(**fields)


def test_what_may_be_none_and_edges_are_taken() -> None:
    edges = Expect(
        fresh=None, alpha_ratio=None, new_tokens=0, param_ratio=(0, 1), max_dropout=1, min_scaling=0
    )
    assert edges.param_ratio == (0, 1)
    assert Expect(min_scaling=1 / 8).low_scaling == 1 / 8
