"""What some steps show, each statement where it turns: on the facts of two sound steps with single facts changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora.bases.examples.models import language_batch
from pytest_lora.facts.model_parts import LayerState, why_silent
from pytest_lora.facts.optimizer import GroupFacts, ScheduleFacts
from pytest_lora.facts.training import LOGGED_AS_ZERO, TrainingFacts, fell
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.probe import training_facts
from tests.rules.training.setups import adapted


@pytest.fixture(scope="module")
def facts() -> TrainingFacts:
    return training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-3))


def with_steps(facts: TrainingFacts, *changes: dict[str, Any]) -> TrainingFacts:
    return replace(facts, steps=tuple(replace(facts.steps[0], **change) for change in changes))


def with_layers(facts: TrainingFacts, **changes: Any) -> TrainingFacts:
    """The facts with one layer of the model, changed."""
    layer = replace(facts.model.layers[0], **changes)
    return replace(facts, model=replace(facts.model, layers=(layer,)))


def with_tensors(facts: TrainingFacts, **changes: Any) -> TrainingFacts:
    return replace(facts, tensors=(replace(facts.tensors[0], **changes),))


def test_two_sound_steps(facts: TrainingFacts) -> None:
    assert facts.has_graph
    assert facts.finite
    assert facts.judges_gradients
    assert facts.adapter_learned
    assert facts.is_fresh
    assert not facts.rates_are_zero
    assert not facts.some_rate_is_zero
    assert not facts.unlearning
    assert facts.peak_rate == 1e-3
    assert facts.chance == math.log(facts.labels[0].limit or 0)


def test_fresh_means_that_every_active_product_is_zero(facts: TrainingFacts) -> None:
    layer = facts.model.layers[0]
    used = replace(layer, b=replace(layer.b, zero=False))
    mixed = replace(facts.model, layers=(layer, used))
    assert not replace(facts, model=mixed).is_fresh
    assert not replace(facts, model=replace(facts.model, active=())).is_fresh
    assert replace(facts, model=replace(mixed, layers=(layer, replace(used, adapter="idle")))).is_fresh


@pytest.mark.parametrize(
    ("inputs", "objective", "compares"),
    [
        (("chosen_ids", "rejected_ids"), "", True),
        (("chosen_ids", "chosen_mask"), "", False),
        (("input_ids",), "", False),
        (("input_ids",), "DPO", True),
        (("input_ids",), "preferences", True),
        (("input_ids",), "policy", False),
    ],
)
def test_answers_are_compared_by_name_or_by_trainer(
    facts: TrainingFacts, inputs: tuple[str, ...], objective: Any, compares: bool
) -> None:
    assert replace(facts, inputs=inputs, objective=objective).compares_answers is compares


def a_group(index: int, *parts: Any, initial: float | None = None) -> GroupFacts:
    return GroupFacts(index, 0.0, initial, 0.0, None, parts, ())


def rated(facts: TrainingFacts, groups: tuple[GroupFacts, ...], *rates: tuple[float, ...]) -> TrainingFacts:
    changed = with_steps(facts, *({"rates": rate} for rate in rates))
    return replace(changed, optimizer=replace(facts.optimizer, groups=groups))


def a_schedule(peak: float | None) -> ScheduleFacts:
    return ScheduleFacts("LambdaLR", 0, peak, None, None, None, None, True)


@pytest.mark.parametrize(
    ("groups", "schedule", "peak"),
    [
        ((a_group(0, "a"), a_group(1, "b")), None, 0.2),
        ((a_group(0, "a"), a_group(1, "base")), None, 0.5),
        ((a_group(0, "base"), a_group(1, "rows")), None, 0.0),
        ((a_group(0, "a"), a_group(1, "b", initial=0.9)), None, 0.9),
        ((a_group(0, "a"), a_group(1, "b", initial=0.9)), a_schedule(0.3), 0.3),
        ((a_group(0, "a"), a_group(1, "b", initial=0.9)), a_schedule(None), 0.9),
        ((a_group(0, "a", "b"), a_group(1, "b")), None, 0.5),
    ],
)
def test_the_peak_rate_is_that_of_lora_b(
    facts: TrainingFacts, groups: tuple[GroupFacts, ...], schedule: ScheduleFacts | None, peak: float
) -> None:
    changed = rated(facts, groups, (0.5, 0.1), (math.nan, 0.2))
    assert replace(changed, schedule=schedule).peak_rate == peak


@pytest.mark.parametrize(
    ("parts", "rates", "all_zero", "some_zero"),
    [
        ((("a",), ("b",)), ((0.0, 0.0), (0.0, 0.0)), True, True),
        ((("a",), ("b",)), ((0.0, 0.0), (0.0, 0.1)), False, True),
        ((("a",), ("b",)), ((0.1, 0.0), (0.0, 0.1)), False, False),
        ((("a",), ()), ((0.1, 0.0), (0.1, 0.0)), False, False),
        (((), ("b",)), ((0.1, 0.0), (0.1, 0.0)), True, True),
        (((), ()), ((0.0, 0.0),), False, False),
    ],
)
def test_rates_of_zero(facts: TrainingFacts, parts: Any, rates: Any, all_zero: bool, some_zero: bool) -> None:
    changed = rated(facts, tuple(a_group(i, *held) for i, held in enumerate(parts)), *rates)
    assert (changed.rates_are_zero, changed.some_rate_is_zero) == (all_zero, some_zero)


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({}, True),
        ({"part": "a"}, True),
        ({"part": "further"}, False),
        ({"trainable": False}, False),
        ({"adapter": "idle"}, False),
        ({"gradients": (None, 0.0)}, False),
        ({"gradients": (None, 1.0)}, True),
        ({"moves": (0.0, 0.0)}, False),
        ({"moves": (0.0, 1e-9)}, True),
    ],
)
def test_an_adapter_learned_where_a_factor_was_reached_and_moved(
    facts: TrainingFacts, changes: dict[str, Any], learns: bool
) -> None:
    factor = {"part": "b", "trainable": True, "gradients": (1.0,), "moves": (1e-3,)}
    assert with_tensors(facts, **{**factor, **changes}).adapter_learned is learns


@pytest.mark.parametrize(
    ("changes", "trains"),
    [({}, True), ({"dtype": "bfloat16"}, False), ({"trainable": False}, False), ({"held": False}, False)],
)
def test_float16_is_trained_where_the_optimizer_holds_it(
    facts: TrainingFacts, changes: dict[str, Any], trains: bool
) -> None:
    tensor = {"dtype": "float16", "trainable": True, "held": True, **changes}
    assert with_tensors(facts, **tensor).trains_float16 is trains


@pytest.mark.parametrize(
    ("steps", "zero", "zero_with_gradient", "finite"),
    [
        ([{"loss": 0.0, "gradient_norm": None}], True, False, True),
        ([{"loss": 0.0, "gradient_norm": 0.0}], True, False, True),
        ([{"loss": 0.0, "gradient_norm": 0.1}], False, True, True),
        ([{"loss": -0.9 * LOGGED_AS_ZERO, "gradient_norm": 0.1}], False, True, True),
        ([{"loss": LOGGED_AS_ZERO, "gradient_norm": 0.1}], False, False, True),
        ([{"loss": 0.0, "gradient_norm": math.inf}], False, False, False),
        ([{"loss": 0.0, "gradient_norm": 0.0}, {"loss": 1.0, "gradient_norm": 1.0}], False, False, True),
        ([{"loss": math.nan, "gradient_norm": 1.0}], False, False, False),
        ([{"loss": 1.0, "gradient_norm": math.nan}], False, False, False),
        ([], False, False, True),
    ],
)
def test_losses_of_zero_and_without_end(
    facts: TrainingFacts, steps: list[dict[str, Any]], zero: bool, zero_with_gradient: bool, finite: bool
) -> None:
    changed = with_steps(facts, *steps)
    assert changed.loss_is_zero is zero
    assert bool(changed.zero_has_gradient) is zero_with_gradient
    assert changed.finite is finite
    unknown = zero or not steps or any(math.isnan(step["loss"]) for step in steps)
    assert changed.judges_gradients is not unknown


def test_the_trainer_logs_four_decimals() -> None:
    assert round(LOGGED_AS_ZERO * 0.999, 4) == 0
    assert round(LOGGED_AS_ZERO * 1.001, 4) == 1e-4


def test_labels_are_ignored_where_a_batch_that_was_run_has_none(facts: TrainingFacts) -> None:
    known = facts.labels[0]
    empty = replace(known, labels=0)
    assert replace(facts, labels=(empty,)).labels_ignored
    assert not replace(facts, labels=(empty,)).judges_gradients
    assert not replace(facts, labels=(replace(empty, batch=7),)).labels_ignored
    assert not replace(facts, labels=(replace(known, labels=1),)).labels_ignored


@pytest.mark.parametrize(
    ("kind", "limit", "chance"),
    [
        ("causal", 256, 256),
        ("sequence", 256, 256),
        ("classes", 256, None),
        ("causal", None, None),
        ("causal", 1, None),
        ("causal", 2, 2),
    ],
)
def test_chance_is_that_of_a_language_model(
    facts: TrainingFacts, kind: Any, limit: int | None, chance: int | None
) -> None:
    changed = replace(facts, labels=(replace(facts.labels[0], kind=kind, limit=limit),))
    assert changed.chance == (None if chance is None else math.log(chance))


@pytest.mark.parametrize(
    ("losses", "went_down"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 0.98], True),
        ([1.0, 0.99], False),
        ([100.0, 99.0], False),
        ([100.0, 98.9], True),
        ([1.0, math.nan, 0.98], True),
        ([-1.0, -1.02], True),
        ([-1.0, -1.0], False),
        ([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0], False),
        ([2.0, 4.0, 9.0, 9.0, 9.0, 9.0, 3.0, 2.0], True),
        ([2.0, 4.0, 9.0, 9.0, 9.0, 9.0, 3.0, 3.0], False),
    ],
)
def test_a_curve_fell_where_its_last_quarter_is_a_hundredth_below_its_first(
    losses: list[float], went_down: bool
) -> None:
    assert fell(losses) is went_down


def test_a_flat_history_has_five_losses(facts: TrainingFacts) -> None:
    assert not replace(facts, history=(1.0,) * 4).history_is_flat
    assert replace(facts, history=(1.0,) * 5).history_is_flat
    assert not replace(facts, history=(1.0, 1.0, 1.0, 1.0, 0.5)).history_is_flat
    assert replace(facts, history=(1.0, 1.0, 1.0, 1.0, 0.5)).history_fell


def test_what_saw_no_gradient_is_unlearning(facts: TrainingFacts) -> None:
    layer = facts.model.layers[0]
    silent = with_tensors(facts, module="elsewhere")
    assert layer in silent.unlearning
    assert replace(silent, model=replace(silent.model, active=())).unlearning == ()
    assert layer not in with_tensors(facts, module=layer.module, part="b", gradients=(1.0,)).unlearning


WHY: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({"disabled": True}, {}, "adapters are disabled"),
    ({"merged": True}, {}, "the adapter is merged"),
    ({}, {"untouched": "it"}, "the module is outside the forward pass"),
    (
        {},
        {"cut": "it"},
        "reentrant gradient checkpointing runs it without a graph: no input of its block requires gradients",
    ),
    ({}, {"cut": "it", "inputs": ("inputs_embeds",)}, "past the hook on the embeddings"),
    ({}, {"without_graph": "it"}, "it runs under torch.no_grad()"),
    ({"scaling": 0.0, "alpha": 0.0}, {}, "lora_alpha=0: the scaling is 0"),
    ({"dropout": 1.0}, {}, "lora_dropout=1 drops every input"),
    ({"dropout": 0.99}, {}, None),
]


@pytest.mark.parametrize(("layer", "training", "why"), WHY)
def test_why_an_adapter_is_silent(
    facts: TrainingFacts, layer: dict[str, Any], training: dict[str, Any], why: str | None
) -> None:
    known = facts.model.layers[0]
    other = facts.model.layers[1].module
    changes = {name: (other, known.module) if value == "it" else value for name, value in training.items()}
    said = why_silent(replace(facts, **changes), replace(known, **layer))
    assert said is why is None or (why is not None and said is not None and why in said)


def factors(layer: LayerState, a: dict[str, Any], b: dict[str, Any]) -> LayerState:
    return replace(layer, a=replace(layer.a, **a), b=replace(layer.b, **b))


def test_why_the_factors_keep_an_adapter_silent(facts: TrainingFacts) -> None:
    layer = facts.model.layers[0]
    frozen = {"trainable": False}
    assert why_silent(facts, factors(layer, frozen, frozen)) == "its tensors are frozen (requires_grad=False)"
    assert why_silent(facts, factors(layer, {}, {"zero": True, **frozen})) == "lora_B is zero and frozen"
    assert (
        why_silent(facts, factors(layer, {"zero": True}, {"zero": True})) == "lora_A and lora_B are both zero"
    )
    assert why_silent(facts, factors(layer, {"zero": True}, {"zero": False})) is None
    assert why_silent(facts, factors(layer, frozen, {"zero": False})) is None
    cut = replace(facts, model=replace(facts.model, reentrant_without_inputs=True))
    assert "without input gradients cuts the graph" in str(why_silent(cut, layer))
    no_graph = with_steps(replace(facts, without_graph=(layer.module,)), {"has_graph": False})
    assert why_silent(no_graph, layer) is None


def test_embeddings_are_passed_by_where_embeddings_are_given(facts: TrainingFacts) -> None:
    base = replace(facts.model.base, input_embeddings=facts.model.layers[0].module)
    changed = replace(
        facts,
        model=replace(facts.model, base=base),
        untouched=tuple(layer.module for layer in facts.model.layers),
        inputs=("inputs_embeds",),
    )
    first, second = facts.model.layers[:2]
    assert str(why_silent(changed, first)).endswith("past the embeddings")
    assert why_silent(changed, second) == "the module is outside the forward pass"
    tokens = replace(changed, inputs=("input_ids",))
    assert why_silent(tokens, first) == "the module is outside the forward pass"
