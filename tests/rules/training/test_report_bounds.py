"""Each number in the rules on public reports, on both sides: two sound steps with single facts changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora import Expect
from pytest_lora.bases.examples.models import language_batch
from pytest_lora.facts.steps import PaddingFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.probe import training_facts
from pytest_lora.rules import find
from tests.rules.test_history_bounds import known
from tests.rules.test_history_bounds import says as says_of_a_run
from tests.rules.training.setups import adapted
from tests.rules.training.test_bounds import says

LN_2 = math.log(2)


@pytest.fixture(scope="module")
def sound() -> TrainingFacts:
    return training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-3))


def with_bounds(facts: TrainingFacts, rows: int = 4, kind: str = "causal", **bounds: Any) -> TrainingFacts:
    """The facts with one batch of labels, changed."""
    (labels, *_) = facts.labels
    changed: Any = {"rows": rows, "kind": kind, "bounds": replace(labels.bounds, **bounds)}
    return replace(facts, labels=(replace(labels, **changed),))


def with_another(facts: TrainingFacts, **bounds: Any) -> TrainingFacts:
    """The facts with a second batch of labels."""
    (labels,) = facts.labels
    return replace(facts, labels=(labels, replace(labels, bounds=replace(labels.bounds, **bounds))))


def evaluates(rule: str, facts: TrainingFacts) -> bool:
    """Whether a rule speaks where a model is only used."""
    judge = find(rule)
    assert judge is not None
    return bool(list(judge(facts, Expect(purpose="inference"))))


# ------------------------------------------------------------------ LORA381


@pytest.mark.parametrize(
    ("furthest", "positions", "beginning"),
    [(17, 16, "warning: texts of up to 17 tokens"), (16, 16, None), (17, None, None)],
)
def test_the_positions_of_a_base(
    sound: TrainingFacts, furthest: int, positions: int | None, beginning: str | None
) -> None:
    facts = with_bounds(sound, furthest=furthest, positions=positions)
    says("LORA381", facts, beginning)
    assert not evaluates("LORA381", facts)


def test_the_longest_text_is_named(sound: TrainingFacts) -> None:
    facts = with_another(with_bounds(sound, furthest=17, positions=16), furthest=30, positions=16)
    says("LORA381", facts, "warning: texts of up to 30 tokens, and the base was trained for 16 positions")
    shorter = with_another(with_bounds(sound, furthest=17, positions=16), furthest=3)
    says("LORA381", shorter, "warning: texts of up to 17 tokens")


# ------------------------------------------------------------------ LORA382


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"rows": 2, "opens": 0, "opened": 0}, "warning: none of 2 rows holds the begin token 0"),
        ({"rows": 1, "opens": 0, "opened": 0}, None),
        ({"rows": 2, "opens": 0, "opened": 1}, None),
        ({"rows": 2, "opens": None, "opened": 0}, None),
        ({"rows": 2, "kind": "encoder-decoder", "opens": 0, "opened": 0}, None),
    ],
)
def test_rows_without_a_begin_token(
    sound: TrainingFacts, changes: dict[str, Any], beginning: str | None
) -> None:
    says("LORA382", with_bounds(sound, **changes), beginning)


def test_one_begin_token_in_another_batch_is_enough(sound: TrainingFacts) -> None:
    without = with_bounds(sound, rows=1, opens=0, opened=0)
    says("LORA382", with_another(without, opened=0), "warning: none of 2 rows")
    says("LORA382", with_another(without, opened=1), None)


# ------------------------------------------------------------------ LORA383


@pytest.mark.parametrize(
    ("losses", "still", "beginning"),
    [
        (60, 20, "warning: the learning rate is 0 since step 40, for 20 steps, 33%"),
        (60, 19, None),
        (200, 20, "warning: the learning rate is 0 since step 180, for 20 steps, 10%"),
        (201, 20, None),
        (60, 60, None),
    ],
)
def test_steps_without_a_rate(losses: int, still: int, beginning: str | None) -> None:
    rates = (1e-4,) * (losses - still) + (0.0,) * still
    says_of_a_run("LORA383", known(rates=rates), beginning)


def test_steps_are_those_between_losses() -> None:
    rates = (1e-4,) * 40 + (0.0,) * 20
    says_of_a_run(
        "LORA383",
        known(rates=rates, steps_per_loss=10),
        "warning: the learning rate is 0 since step 400, for 200 steps, 33%",
    )


# ------------------------------------------------------------------ LORA384


def test_short_masks_of_a_model_s_own_loss_in_training(sound: TrainingFacts) -> None:
    facts = replace(sound, odd=("batch 0", "batch 1"))
    says("LORA384", facts, "error: the mask ends before the tokens do")
    says("LORA384", sound, None)
    says("LORA384", replace(facts, custom_loss=True), None)
    assert not evaluates("LORA384", facts)


# ------------------------------------------------------------------ LORA385


def with_init(facts: TrainingFacts, init: str, largest: float | None, zero: bool = True) -> TrainingFacts:
    """The facts with this initialisation, and the first of the layers, of 100 inputs, with other factors."""
    model = facts.model
    configs = tuple(
        replace(one, settings=replace(one.settings, init_lora_weights=init)) for one in model.configs
    )
    layers = [
        replace(one, in_features=100, a=replace(one.a, largest=0.1), b=replace(one.b, zero=True))
        for one in model.layers
    ]
    layers[0] = replace(layers[0], a=replace(layers[0].a, largest=largest), b=replace(layers[0].b, zero=zero))
    return replace(facts, model=replace(model, configs=configs, layers=tuple(layers)))


@pytest.mark.parametrize(
    ("init", "largest", "zero", "speaks"),
    [
        ("eva", 0.1, True, True),
        ("EVA", 0.1, True, True),
        ("lora_ga", 0.1, True, True),
        ("eva", 0.1009, True, True),  # 1 / sqrt(100), and one part in a hundred for the rounding of 16 bits
        ("eva", 0.1011, True, False),
        ("eva", 0.1, False, False),
        ("eva", 0.0, True, False),
        ("eva", None, True, False),
        ("pissa", 0.1, True, False),
    ],
)
def test_an_initialisation_that_was_not_computed(
    sound: TrainingFacts, init: str, largest: float | None, zero: bool, speaks: bool
) -> None:
    beginning = (
        f"warning: init_lora_weights={init!r} of adapter 'default' was not computed" if speaks else None
    )
    says("LORA385", with_init(sound, init, largest, zero), beginning)


# ------------------------------------------------------------------ LORA386


def test_the_part_of_a_gradient_at_padding(sound: TrainingFacts) -> None:
    def facts(share: float, told: bool = False) -> TrainingFacts:
        labels = tuple(replace(one, padding=int(told)) for one in sound.labels)
        return replace(sound, labels=labels, padding=PaddingFacts(batch=0, rows=3, share=share))

    says("LORA386", facts(0.11), "warning: 11% of the gradient")
    says("LORA386", facts(0.1), None)
    says("LORA386", facts(0.11, told=True), None)
    says("LORA386", sound, None)


# ------------------------------------------------------------------ LORA387


def preferring(facts: TrainingFacts, *losses: float, **changes: Any) -> TrainingFacts:
    """The facts of these losses of chosen and rejected answers, with a reference of the adapter itself."""
    steps = tuple(replace(facts.steps[0], loss=loss) for loss in losses)
    return replace(facts, **{"steps": steps, "objective": "DPO", "at_itself": True, **changes})


@pytest.mark.parametrize(
    ("losses", "changes", "speaks"),
    [
        ((LN_2, LN_2), {}, True),
        ((LN_2, LN_2 * (1 + 0.9e-7)), {}, True),
        ((LN_2, LN_2 * (1 + 1.1e-7)), {}, False),
        ((LN_2 * (1 - 1.1e-7), LN_2), {}, False),
        ((LN_2,), {}, False),
        ((LN_2, LN_2), {"objective": "texts"}, False),
        ((LN_2, LN_2), {"at_itself": False}, False),
        ((LN_2, LN_2), {"switched_off": True}, False),
    ],
)
def test_a_loss_that_stays_at_ln_2(
    sound: TrainingFacts, losses: tuple[float, ...], changes: dict[str, Any], speaks: bool
) -> None:
    facts = preferring(sound, *losses, **changes)
    says(
        "LORA387",
        facts,
        f"error: the loss is ln 2 to the last digit at all {len(losses)}" if speaks else None,
    )


# ------------------------------------------------------------------ LORA389


@pytest.mark.parametrize(
    ("changes", "speaks"),
    [
        ({"rows": 2, "header": 2}, True),
        ({"rows": 1, "header": 1}, False),
        ({"rows": 3, "header": 2}, False),
        ({"rows": 2, "header": 2, "kind": "encoder-decoder"}, False),
    ],
)
def test_texts_that_end_with_a_header(sound: TrainingFacts, changes: dict[str, Any], speaks: bool) -> None:
    facts = with_bounds(sound, **changes)
    says("LORA389", facts, f"warning: all {changes['rows']} texts end" if speaks else None)
    assert not evaluates("LORA389", facts)
