"""How near to a remembered output another one has to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_lora.inspection.behaviour.copies import TOLERANCES
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
