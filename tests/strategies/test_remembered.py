"""How near to a remembered output another one has to be."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_lora.inspection.behaviour import TOLERANCES
from pytest_lora.rules import catalogue
from pytest_lora.strategies import remembered
from pytest_lora.strategies.remembered import RememberedOutputs


def machine(**known: Any) -> Any:
    """One that has not begun."""
    made = object.__new__(RememberedOutputs)
    vars(made).update({"rounded": False, "merged": False, "disabled": False, **known})
    return made


def same(share: float, *, rounded: bool = False, since: bool = False) -> bool:
    """Whether an output counts as the same that moved by a share of what rounding may do."""
    expected = torch.tensor([8.0, -16.0, 0.0])
    moved = expected.clone()
    moved[2] = share * TOLERANCES[torch.float32] * 16
    try:
        machine(rounded=since)._same(moved, expected, "it", rounded)
    except AssertionError:
        return False
    return True


def test_outputs_are_equal_but_for_the_rounding_of_merges() -> None:
    assert same(0.0)
    assert not same(0.1)
    assert same(0.9, rounded=True)
    assert same(0.9, since=True)
    assert not same(1.1, rounded=True)
    assert not same(1.1, since=True)


def test_whole_numbers_are_not_rounded() -> None:
    with pytest.raises(AssertionError, match="at most 0 is rounding"):
        machine(rounded=True)._same(torch.tensor([1, 3]), torch.tensor([1, 2]), "it")


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("disabled", [True, False])
def test_a_model_is_at_rest_where_nothing_is_merged_or_disabled(merged: bool, disabled: bool) -> None:
    assert machine(merged=merged, disabled=disabled)._at_rest() is (not merged and not disabled)


def test_names_that_are_free() -> None:
    assert machine(outputs={"first": 0, "third": 0})._free() == ["second", "fourth"]


def test_adapters_of_each_variant() -> None:
    rs, dora, plain = (machine()._config(4, variant) for variant in ("rslora", "dora", "plain"))
    assert [(one.use_rslora, one.use_dora) for one in (rs, dora, plain)] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert (plain.r, plain.lora_alpha) == (4, 8)


PASSING = next(rule.code for rule in catalogue() if rule.passing)


@pytest.mark.parametrize(
    ("known", "code", "passes"),
    [
        ({"merged": True}, PASSING, True),
        ({"disabled": True}, PASSING, True),
        ({}, PASSING, False),
        ({"merged": True}, "LORA000", False),
    ],
)
def test_errors_that_merged_and_disabled_adapters_may_have(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], code: str, passes: bool
) -> None:
    report = SimpleNamespace(errors=[SimpleNamespace(code=code)])
    monkeypatch.setattr(remembered, "check_model", lambda model, expect: report)
    with nullcontext() if passes else pytest.raises(AssertionError, match=code):
        machine(model=None, **known).checks_pass()


def test_disabled_adapters_give_the_base_and_each_state_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RememberedOutputs, "steps", 0)
    plain, other = torch.zeros(2), torch.ones(2)
    machine(disabled=True, plain=plain, _now=lambda: plain.clone()).laws_hold()
    with pytest.raises(AssertionError, match="disabled adapters"):
        machine(disabled=True, plain=plain, _now=lambda: other).laws_hold()
    merged = {"merged": True, "outputs": {"it": other}, "model": SimpleNamespace(active_adapter="it")}
    machine(**merged, _now=lambda: other.clone()).laws_hold()
    with pytest.raises(AssertionError, match="adapter 'it'"):
        machine(**merged, _now=lambda: plain).laws_hold()
    assert RememberedOutputs.steps == 4
