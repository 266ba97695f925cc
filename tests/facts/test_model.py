"""What one adapter on one module can do, each statement where it turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import Factor, LayerState
from pytest_lora.facts.optimizer import GroupFacts, Missing, OptimizerFacts
from pytest_lora.inspection.model import model_facts
from tests.rules.training.setups import adapted


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return model_facts(adapted())


def state(layer: LayerState, a: dict[str, Any], b: dict[str, Any], **changes: Any) -> LayerState:
    return replace(layer, a=replace(layer.a, **a), b=replace(layer.b, **b), **changes)


@pytest.mark.parametrize(
    ("a_trains", "a_zero", "b_trains", "b_zero", "can_learn"),
    [
        (True, False, True, True, True),
        (True, False, False, True, False),
        (False, False, True, True, True),
        (False, True, True, False, False),
        (True, True, False, False, True),
        (True, True, True, True, False),
        (False, False, False, False, False),
        (True, None, False, None, True),
        (False, None, True, None, True),
    ],
)
def test_a_factor_learns_by_what_the_other_holds(
    facts: ModelFacts,
    a_trains: bool,
    a_zero: bool | None,
    b_trains: bool,
    b_zero: bool | None,
    can_learn: bool,
) -> None:
    layer = state(
        facts.layers[0], {"trainable": a_trains, "zero": a_zero}, {"trainable": b_trains, "zero": b_zero}
    )
    assert layer.can_learn is can_learn
    assert layer.trainable is (a_trains or b_trains)


@pytest.mark.parametrize(
    ("a_zero", "b_zero", "changes"),
    [
        (False, False, True),
        (True, False, False),
        (False, True, False),
        (None, False, None),
        (False, None, None),
    ],
)
def test_the_output_changes_where_neither_factor_is_zero(
    facts: ModelFacts, a_zero: bool | None, b_zero: bool | None, changes: bool | None
) -> None:
    assert state(facts.layers[0], {"zero": a_zero}, {"zero": b_zero}).changes_output is changes


@pytest.mark.parametrize(
    ("module", "inside"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", True),
        ("layers.0.expert_2.w1", True),
        ("layers.0.mlp.up_proj", False),
    ],
)
def test_experts_are_known_by_their_names(facts: ModelFacts, module: str, inside: bool) -> None:
    assert replace(facts.layers[0], module=module).in_expert is inside


@pytest.mark.parametrize(
    ("factor", "swappable", "empty", "as_configured", "swapped"),
    [
        (1.0, True, 1, True, False),
        (1 + 5e-6, True, 0, True, False),
        (1 + 2e-5, True, 0, False, True),
        (1 + 2e-5, False, 1, False, True),
        (1 + 2e-5, False, 0, False, False),
    ],
)
def test_a_swapped_adapter_shows_by_scaling_and_room(
    facts: ModelFacts, factor: float, swappable: bool, empty: int, as_configured: bool, swapped: bool
) -> None:
    layer = facts.layers[0]
    changed = replace(
        layer, scaling=layer.configured_scaling * factor, swappable=swappable, empty_ranks=empty
    )
    assert (changed.is_scaled_as_configured, changed.is_swapped) == (as_configured, swapped)


@pytest.mark.parametrize(
    ("dtype", "whole"), [("int8", True), ("uint8", True), ("float8_e4m3fn", False), ("bfloat16", False)]
)
def test_whole_numbers_are_quantized(dtype: str, whole: bool) -> None:
    assert Factor("lora_A", (8, 64), dtype, "cpu", True, False, True).is_quantized is whole


def test_adapters_of_a_model(facts: ModelFacts) -> None:
    first, second = facts.layers[:2]
    idle = replace(second, adapter="other")
    changed = replace(facts, layers=(first, idle), adapters=("default", "other"))
    assert changed.active_layers == (first,)
    assert changed.of("other") == (idle,)
    assert changed.training_adapters == ("default", "other")
    assert not changed.disabled
    off = replace(changed, layers=(replace(first, disabled=True), idle))
    assert not off.disabled
    assert replace(off, layers=off.layers[:1]).disabled
    assert not replace(off, layers=()).disabled
    assert changed.config_of("default") is facts.configs[0]
    assert changed.config_of("other") is None


@pytest.mark.parametrize(
    ("one", "other", "one_is_empty", "wiped"),
    [
        ("my_adapter", "adapter", True, (("my_adapter", "adapter"),)),
        ("my_adapter", "adapter", False, ()),
        ("first", "second", True, ()),
        ("my_adapter", "my_adapter", True, ()),
    ],
)
def test_an_adapter_is_wiped_where_another_name_is_within_its_own(
    facts: ModelFacts, one: str, other: str, one_is_empty: bool, wiped: tuple[tuple[str, str], ...]
) -> None:
    zero = {"zero": one_is_empty}
    layers = (
        state(facts.layers[0], zero, {"zero": True}, adapter=one),
        state(facts.layers[0], {"zero": one == other}, {"zero": one == other}, adapter=other),
    )
    changed = replace(facts, layers=layers, adapters=tuple(dict.fromkeys((one, other))))
    assert changed.wiped == wiped


@pytest.mark.parametrize(
    ("name", "adaptive", "adam", "plain"),
    [
        ("AdamW", True, True, False),
        ("PagedAdamW8bit", True, True, False),
        ("Lion", True, False, False),
        ("RMSprop", True, False, False),
        ("SGD", False, False, True),
        ("Adafactor", False, False, False),
        ("MyAdamW", False, False, False),
    ],
)
def test_kinds_of_optimizers(name: str, adaptive: bool, adam: bool, plain: bool) -> None:
    facts = OptimizerFacts(name, (), (), 0, 0, ())
    assert (facts.adaptive, facts.adam, facts.plain) == (adaptive, adam, plain)


@pytest.mark.parametrize(
    ("parts", "foreign", "missing", "holds", "stale"),
    [
        ((), 1, "b", False, True),
        ((), 1, "a", False, True),
        ((), 0, "b", False, False),
        ((), 1, "base", False, False),
        (("b",), 1, "b", True, False),
        (("a", "base"), 1, "b", True, False),
        (("base",), 1, "b", False, True),
    ],
)
def test_an_optimizer_is_stale_where_it_holds_something_else(
    parts: Any, foreign: int, missing: Any, holds: bool, stale: bool
) -> None:
    group = GroupFacts(0, 1e-3, None, 0.0, None, parts, ())
    facts = OptimizerFacts("AdamW", (), (Missing("it", missing),), 0, foreign, (group,))
    assert (facts.holds_adapter, facts.stale) == (holds, stale)
    assert facts.lacks(missing) == ("it",)
    assert facts.lacks("further") == ()
