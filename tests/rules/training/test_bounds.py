"""Each number in the rules on rates, losses and moves, on both sides: two sound steps with single facts changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora import Expect
from pytest_lora.bases.examples.models import language_batch
from pytest_lora.facts.optimizer import ScheduleFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.training.batches import Plan
from pytest_lora.inspection.training.probe import training_facts
from pytest_lora.rules import find
from tests.rules.training.setups import adapted

VOCABULARY = 128
CHANCE = math.log(VOCABULARY)
FLAT = (4.0,) * 5
FELL = (4.0, 4.0, 4.0, 4.0, 2.0)


@pytest.fixture(scope="module")
def sound() -> TrainingFacts:
    return training_facts(adapted(), language_batch(), Plan(steps=2, rate=1e-3))


def says(rule: str, facts: object, beginning: str | None) -> None:
    """Hold what a rule says to a severity and the first words that it sees, or to nothing."""
    judge = find(rule)
    assert judge is not None
    found = [f"{one.severity}: {one.observed}" for one in judge(facts, Expect())]
    assert not found if beginning is None else found and found[0].startswith(beginning), found


def changed(
    facts: TrainingFacts,
    *,
    rates: tuple[float, ...] = (1e-3, 1e-3),
    losses: tuple[float, ...] = (4.0, 4.0),
    norms: tuple[float | None, ...] = (1.0, 1.0),
    optimizer: str = "AdamW",
    groups: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainingFacts:
    """The facts with one group at these rates, and with these losses and norms of gradients."""
    (group, *_) = facts.optimizer.groups
    given = replace(
        group, **{"index": 0, "initial_lr": None, "parts": ("a", "b"), "eps": 1e-8, **(groups or {})}
    )
    steps = tuple(
        replace(facts.steps[0], batch=0, rates=(rate,), loss=loss, gradient_norm=norm)
        for rate, loss, norm in zip(rates, losses, norms, strict=True)
    )
    named = tuple(replace(tensor, **(tensors or {})) for tensor in facts.tensors)
    held = replace(facts.optimizer, optimizer=optimizer, groups=(given,))
    return replace(facts, steps=steps, optimizer=held, tensors=named, **changes)


def schedule(**changes: Any) -> ScheduleFacts:
    unknown = {"peak": None, "not_before": None, "ends": None, "warm_up": None, "planned": None}
    return ScheduleFacts(**{"schedule": "LambdaLR", "steps_taken": 5, **unknown, "drives": True, **changes})


# ------------------------------------------------------------------ LORA305

HARDLY = "warning: a learning rate of"
SMALL = {"gradients": (1.0,), "numbers": 100, "held": True, "part": "b"}


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"rates": (9.9e-8,) * 2}, HARDLY),
        ({"rates": (1e-7,) * 2}, None),
        ({"rates": (1.9e-6,) * 2, "history": FLAT}, HARDLY),
        ({"rates": (2e-6,) * 2, "history": FLAT}, None),
        ({"rates": (1.9e-6,) * 2, "history": FELL}, None),
        ({"rates": (0.0,) * 2}, None),
        # Gradients of 0.1 a number: what eps leaves of a step is 0.1 / (0.1 + eps), and counts below a tenth.
        ({"rates": (1e-6,) * 2, "groups": {"eps": 1.1}, "tensors": SMALL}, "warning: eps=1.1 outweighs"),
        ({"rates": (9.9e-7,) * 2, "groups": {"eps": 0.9}, "tensors": SMALL}, None),
        ({"rates": (1.3e-6,) * 2, "groups": {"eps": 1.1}, "tensors": SMALL}, None),
        ({"rates": (1e-6,) * 2, "groups": {"eps": 1.1}, "tensors": {**SMALL, "held": False}}, None),
        ({"rates": (1e-6,) * 2, "groups": {"eps": 1.1}, "tensors": SMALL, "optimizer": "Lion"}, None),
        ({"rates": (9e-8,) * 2, "groups": {"eps": 1.1}, "tensors": SMALL}, HARDLY),
        # A plain gradient step lowers the loss by rate * norm ** 2.
        ({"rates": (3.9e-7,) * 2, "optimizer": "SGD"}, HARDLY),
        ({"rates": (4.1e-7,) * 2, "optimizer": "SGD"}, None),
        ({"rates": (7.9e-5,) * 2, "optimizer": "SGD", "schedule": schedule(planned=50)}, HARDLY),
        ({"rates": (7.9e-5,) * 2, "optimizer": "SGD", "schedule": schedule(ends=50)}, HARDLY),
        ({"rates": (8.1e-5,) * 2, "optimizer": "SGD", "schedule": schedule(planned=50)}, None),
        ({"rates": (3.9e-7,) * 2, "optimizer": "SGD", "norms": (1.0, 2.0)}, None),
        ({"rates": (3.9e-7,) * 2, "optimizer": "SGD", "norms": (None, math.nan)}, None),
        ({"rates": (3.9e-5,) * 2, "optimizer": "SGD", "history": FLAT}, HARDLY),
        ({"rates": (4.1e-5,) * 2, "optimizer": "SGD", "history": FLAT}, None),
        ({"rates": (1e-9,) * 2, "optimizer": "Adafactor"}, None),
    ],
)  # fmt: skip
def test_a_rate_that_is_too_low(sound: TrainingFacts, changes: Any, beginning: str | None) -> None:
    says("learning_rate_is_too_low", changed(sound, **changes), beginning)


RISES, DECAYS = (1e-7, 2e-7), (1e-6, 5e-7, 2.5e-7)
KEPT_LOW = "warning: the learning rate is too low to learn from, by "


@pytest.mark.parametrize(
    ("rates", "plan", "beginning"),
    [
        (RISES, {"not_before": 501}, f"{KEPT_LOW}warm-up: it is 2e-07 after 5 steps"),
        (RISES, {"not_before": 500}, None),
        (RISES, {"warm_up": 501}, f"{KEPT_LOW}warm-up"),
        (RISES, {"warm_up": 501, "planned": 5010}, None),
        (RISES, {"warm_up": 501, "planned": 5009}, f"{KEPT_LOW}warm-up"),
        (RISES, {"not_before": 501, "steps_taken": 0}, None),
        (RISES, {"not_before": 501, "peak": 2.1e-6}, f"{KEPT_LOW}warm-up"),
        ((1e-7, 1.9e-6), {"not_before": 501}, f"{KEPT_LOW}warm-up"),
        ((1e-7, 2e-6), {"not_before": 501}, None),
        ((1e-7, 2e-7), {"not_before": 501, "peak": 2e-6, "steps_taken": 5}, None),
        (DECAYS, {}, f"{KEPT_LOW}decay: the schedule brought it from 0.001 down to 1e-06 within 5 steps"),
        ((1e-6, 6e-7, 3.6e-7), {}, None),
        ((1e-6, 5e-7), {}, None),
        ((1e-6, 4e-7, 1.6e-7), {}, f"{KEPT_LOW}decay"),
        ((1e-6, 4.9e-7, 4.9e-7 * 0.467), {}, f"{KEPT_LOW}decay"),
        ((1e-6, 4.9e-7, 4.9e-7 * 0.466), {}, None),
        ((1e-6, 0.0, 1e-6), {}, None),  # a rate that pauses
    ],
)
def test_a_schedule_that_keeps_the_rate_low(
    sound: TrainingFacts, rates: tuple[float, ...], plan: dict[str, Any], beginning: str | None
) -> None:
    count = len(rates)
    facts = changed(
        sound,
        rates=rates,
        losses=(4.0,) * count,
        norms=(1.0,) * count,
        history=FLAT,
        schedule=schedule(**{"peak": 1e-3, **plan}),
    )
    says("learning_rate_is_too_low", facts, beginning)
    assert facts.schedule is not None
    says("learning_rate_is_too_low", replace(facts, history=FELL), None)


# ------------------------------------------------------------------ LORA304

LOW = 0.4 * CHANCE
MOVED_A = "error: a learning rate of 0.001: a step moved lora_A by"


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"rates": (0.1, 0.1)}, "warning: a learning rate of 0.1"),
        ({"rates": (0.099, 0.099)}, None),
        ({"schedule": schedule(peak=0.1)}, "warning: a learning rate of 0.1"),
        ({"history": (LOW, CHANCE, CHANCE, CHANCE)}, "error: a learning rate of 0.001: the loss so far diverged"),
        ({"rates": (9.9e-4,) * 2, "history": (LOW, CHANCE, CHANCE, CHANCE)}, None),
        ({"history": (LOW, CHANCE, CHANCE)}, None),
        ({"history": (0.501 * CHANCE, CHANCE, CHANCE, CHANCE)}, None),
        ({"history": (0.499 * CHANCE, CHANCE, CHANCE, CHANCE)}, "error"),
        ({"history": (LOW, 0.801 * CHANCE, CHANCE, CHANCE)}, "error"),
        ({"history": (LOW, CHANCE, CHANCE, 0.799 * CHANCE)}, None),
        ({"history": (LOW, math.inf, CHANCE, CHANCE)}, None),
        ({"rates": (1e-5,) * 2, "history": (CHANCE, CHANCE, 1.2 * CHANCE, 1.51 * CHANCE)}, "error"),
        ({"rates": (1e-5,) * 2, "history": (CHANCE, CHANCE, 1.2 * CHANCE, 1.49 * CHANCE)}, None),
        ({"rates": (1e-5,) * 2, "history": (1.09 * CHANCE, CHANCE, 1.2 * CHANCE, 1.51 * CHANCE)}, "error"),
        ({"rates": (1e-5,) * 2, "history": (1.11 * CHANCE, CHANCE, 1.2 * CHANCE, 1.51 * CHANCE)}, None),
        ({"rates": (1e-5,) * 2, "history": (CHANCE, 1.2 * CHANCE, 1.2 * CHANCE, 1.51 * CHANCE)}, None),
        ({"rates": (1e-5,) * 2, "history": (CHANCE, CHANCE, 1.51 * CHANCE, 1.51 * CHANCE)}, None),
        ({"optimizer": "SGD", "losses": (4.0, 6.01)}, "error: a learning rate of 0.001: the loss went from 4 to 6.01"),
        ({"optimizer": "SGD", "losses": (4.0, 6.0)}, None),
        ({"optimizer": "SGD", "losses": (0.5, 1.01)}, "error"),
        ({"optimizer": "SGD", "losses": (0.5, 1.0)}, None),
        ({"optimizer": "SGD", "losses": (4.0, math.nan)}, "error"),
        ({"optimizer": "SGD", "losses": (math.nan, 9.0)}, None),
        ({"optimizer": "SGD", "tensors": {"part": "a", "scale": 0.1, "moves": (0.5, 1.01)}}, f"{MOVED_A} 10.1 times"),
        ({"optimizer": "SGD", "tensors": {"part": "a", "scale": 0.1, "moves": (0.5, 1.0)}}, None),
        ({"optimizer": "SGD", "tensors": {"part": "a", "scale": 0.0, "moves": (0.5, 1.0)}}, None),
        ({"optimizer": "SGD", "tensors": {"part": "b", "scale": 0.1, "moves": (0.5, 1.01)}}, None),
        ({"optimizer": "Adafactor", "losses": (4.0, 6.01)}, None),
    ],
)  # fmt: skip
def test_a_rate_that_is_too_high(sound: TrainingFacts, changes: Any, beginning: str | None) -> None:
    still = {"part": "a", "scale": 1.0, "moves": (0.001, 0.001)}
    facts = changed(sound, **{"tensors": still, **changes})
    assert facts.chance == CHANCE
    says("learning_rate_is_too_high", facts, beginning)


@pytest.mark.parametrize(
    ("thrown", "rate"), [(10.1, "1e-05"), (99.0, "1e-05"), (101.0, "1e-06"), (math.inf, "0.0001")]
)
def test_the_lower_rate_moves_no_more_than_there_is(sound: TrainingFacts, thrown: float, rate: str) -> None:
    judge = find("learning_rate_is_too_high")
    assert judge is not None
    moved = {"part": "a", "scale": 1.0, "moves": (thrown,)}
    (found,) = judge(changed(sound, optimizer="SGD", tensors=moved), Expect())
    assert found.fix == f"set lr={rate}"


# ------------------------------------------------------------------ LORA325

SUMMED = "error: the loss started at"


@pytest.mark.parametrize(
    ("changes", "labels", "beginning"),
    [
        ({"history": (7.3, 7.3)}, {}, f"{SUMMED} 7.3, 1.5 times ln(vocabulary)"),
        ({"history": (7.27, 7.27)}, {}, None),
        ({"history": (7.3, 7.27)}, {}, None),
        ({"history": (8.0, 8.0), "losses": (4.44, 4.44)}, {}, SUMMED),
        ({"history": (8.0, 8.0), "losses": (4.45, 4.45)}, {}, None),
        ({"history": (8.0, 8.0), "losses": (4.0, math.nan)}, {}, SUMMED),
        ({"history": (8.0, 8.0), "losses": (math.nan, math.nan)}, {}, None),
        ({"history": (8.0, 8.0), "losses": (0.0, -1.0)}, {}, None),
        ({"losses": (24.3, 24.3)}, {}, "warning: the loss is 24.3, 5 times ln(vocabulary)"),
        ({"losses": (24.2, 24.2)}, {}, None),
        ({"losses": (30.0, 30.0)}, {"labels": 8}, "warning"),
        ({"losses": (30.0, 30.0)}, {"labels": 7}, None),
        ({"losses": (58.2, 58.2)}, {"labels": 8}, "warning"),
        ({"losses": (58.3, 58.3)}, {"labels": 8}, None),
        ({"losses": (30.0, 30.0)}, {"kind": "sequence"}, None),
    ],
)
def test_a_loss_that_is_summed(
    sound: TrainingFacts, changes: Any, labels: dict[str, Any], beginning: str | None
) -> None:
    known = (replace(sound.labels[0], **{"limit": VOCABULARY, "labels": 50, **labels}),)
    says("loss_is_summed", changed(sound, labels=known, **changes), beginning)


@pytest.mark.parametrize(
    ("history", "batches", "said"),
    [
        ((16.0, 16.0), 4, "the sum over 4"),
        ((16.0, 19.1), 4, "the sum over 4"),
        ((16.0, 19.3), 4, "it is summed"),
        ((16.0, 12.9), 4, "the sum over 4"),
        ((16.0, 12.7), 4, "it is summed"),
        ((16.0, 8.0), 1, "it is summed"),
        ((16.0, 8.0), 2, "the sum over 2"),
    ],
)
def test_the_sum_over_batches_is_told_as_such(
    sound: TrainingFacts, history: tuple[float, ...], batches: int, said: str
) -> None:
    judge = find("loss_is_summed")
    assert judge is not None
    (found,) = judge(changed(sound, history=history, batches=batches), Expect())
    assert found.observed.endswith(said if said == "it is summed" else f"{said} accumulation steps")


@pytest.mark.parametrize(
    ("history", "limit", "batches", "is_told"),
    [
        ((3.0, 3.0), 4, 3, True),
        ((3.0, 3.0), 4, 2, False),
        ((3.0, 3.0), None, 3, False),
        ((1.5, 1.5), 1, 3, False),
        ((1.5, 1.5), 2, 3, True),
        ((2.78, 2.78), 4, 3, True),
        ((2.77, 2.77), 4, 3, False),
        ((3.5, 3.0), 4, 3, True),
        ((3.7, 3.0), 4, 3, False),
        ((3.0, 3.7), 4, 3, False),
    ],
)
def test_classes_at_a_multiple_of_the_batches(
    sound: TrainingFacts, history: tuple[float, ...], limit: int | None, batches: int, is_told: bool
) -> None:
    # One batch alone has a third of 3, or of what is near it; two classes a third of 1.5.
    alone = 0.5 if limit in (1, 2) else 1.0
    labels = (replace(sound.labels[0], kind="classes", limit=limit),)
    facts = changed(sound, losses=(alone,) * 2, labels=labels, history=history, batches=batches)
    says("loss_is_summed", facts, SUMMED if is_told else None)


# ------------------------------------------------------------------ LORA315

MOVED = {
    "part": "b",
    "gradients": (1.0,),
    "moves": (1e-3,),
    "held": True,
    "dtype": "bfloat16",
    "stayed": 0.95,
    "scale": 1.0,
}
STILL = {**MOVED, "moves": (0.0,)}
LEFT = "warning: a step at a learning rate of 0.001 left"
NOTHING = "error: 2 steps at a learning rate of 0.001 changed nothing"


@pytest.mark.parametrize(
    ("tensors", "changes", "beginning"),
    [
        (STILL, {}, NOTHING),
        (STILL, {"scaler": True}, None),
        (STILL, {"max_grad_norm": 0.0}, None),
        (STILL, {"max_grad_norm": 0.1}, NOTHING),
        (STILL, {"rates": (0.0, 0.0)}, None),
        (STILL, {"norms": (1.0, math.inf)}, None),
        ({**STILL, "held": False}, {}, None),
        ({**STILL, "gradients": (0.0,)}, {}, None),
        (STILL, {"rates": (1e-3, 9.9e-8), "schedule": schedule()}, None),
        (STILL, {"rates": (1e-3, 1e-7), "schedule": schedule()}, "error: 2 steps"),
        (STILL, {"rates": (1e-3, 9.9e-8)}, "error: 2 steps"),
        (STILL, {"rates": (1e-3, 9.9e-8), "schedule": schedule(), "optimizer": "SGD"}, "error: 2 steps"),
        (MOVED, {}, f"{LEFT} 95 % of the numbers of lora_B"),
        ({**MOVED, "stayed": 0.9}, {}, "warning"),
        ({**MOVED, "stayed": 0.89}, {}, None),
        ({**MOVED, "dtype": "float32"}, {}, None),
        (MOVED, {"optimizer": "SGD"}, None),
        (MOVED, {"schedule": schedule(), "history": FELL}, None),
        (MOVED, {"schedule": schedule()}, None),
        (MOVED, {"schedule": schedule(), "history": FLAT}, "warning"),
        ({**MOVED, "part": "a", "stayed": 0.5}, {}, f"{LEFT} 50 % of the numbers of lora_A"),
        ({**MOVED, "part": "a", "stayed": 0.49}, {}, None),
        ({**MOVED, "part": "a", "gradients": (1.0, 0.0)}, {}, None),
        # A step of 0.001 is too small for half of what spreads up to 2 * 384 * 0.001.
        ({**MOVED, "part": "a", "scale": 0.769 / 3**0.5}, {}, "warning"),
        ({**MOVED, "part": "a", "scale": 0.767 / 3**0.5}, {}, None),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_move(
    sound: TrainingFacts, tensors: Any, changes: Any, beginning: str | None
) -> None:
    says("adapter_does_not_move", changed(sound, tensors=tensors, **changes), beginning)


# ------------------------------------------------------------------ LORA370


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"rates": (5e-5,) * 2}, "info: a learning rate of 5e-05, the default of transformers'"),
        ({"rates": (5e-5,) * 2, "optimizer_given": False}, None),
        ({"rates": (5e-5,) * 2, "optimizer": "SGD"}, None),
        ({"rates": (5e-5,) * 2, "history": FELL}, None),
        ({"rates": (5e-5,) * 2, "objective": "policy"}, None),
        ({"rates": (5e-5,) * 2, "objective": "DPO"}, None),
        ({"rates": (5e-5,) * 2, "custom_loss": True, "losses": (0.74, 0.74)}, None),
        ({"rates": (5e-5,) * 2, "custom_loss": True, "losses": (0.75, 0.75)}, "info"),
        ({"rates": (5e-5,) * 2, "custom_loss": True, "losses": (0.74, 0.74), "objective": "texts"}, "info"),
        ({"rates": (5e-5,) * 2, "losses": (0.74, 0.74)}, "info"),
        # r=8 at a scaling of 2 adds rate * steps * 2 * sqrt(8 / 3).
        ({"rates": (6.1e-5,) * 2, "schedule": schedule(planned=50)}, "warning: 50 steps at a learning rate of 6.1e-05"),
        ({"rates": (6.2e-5,) * 2, "schedule": schedule(planned=50)}, None),
        ({"rates": (6.1e-5,) * 2, "schedule": schedule(planned=49)}, None),
        ({"rates": (6.1e-5,) * 2, "schedule": schedule()}, None),
        ({"rates": (1.01e-7,) * 2, "schedule": schedule(planned=50)}, "warning"),
        ({"rates": (1e-7,) * 2, "schedule": schedule(planned=50)}, None),
    ],
)  # fmt: skip
def test_a_rate_of_full_fine_tuning(sound: TrainingFacts, changes: Any, beginning: str | None) -> None:
    says(
        "learning_rate_is_of_full_fine_tuning",
        changed(sound, **{"optimizer_given": True, **changes}),
        beginning,
    )


# ------------------------------------------------------------------ LORA303


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"rates": (0.0, 0.0)}, "error: the learning rate is 0 at all 2 steps"),
        ({"rates": (0.0,), "losses": (4.0,), "norms": (1.0,)}, "error: the learning rate is 0 at all 1 steps"),
        ({"rates": (0.0,), "losses": (4.0,), "norms": (1.0,), "schedule": schedule()}, None),
        ({"rates": (0.0, 0.0), "schedule": schedule()}, "info: the schedule has come to its end after 5 steps"),
        ({"rates": (0.0, 0.0), "schedule": schedule(), "history": FELL}, "info"),
        ({"rates": (0.0, 0.0), "schedule": schedule(), "history": FLAT}, "error: the scheduler keeps"),
        ({"rates": (0.0, 0.0), "schedule": schedule(), "groups": {"initial_lr": 0.0}}, "error: the learning rate is 0"),
        ({"schedule": schedule(ends=2), "history": FLAT}, "error: the scheduler keeps the learning rate at 0"),
        ({"schedule": schedule(ends=3), "history": (4.0,) * 6}, None),
        ({"rates": (0.0, 1e-3), "schedule": schedule(steps_taken=0), "history": FLAT}, "warning: the scheduler"),
        ({"rates": (0.0, 1e-3), "schedule": schedule(steps_taken=1), "history": FLAT}, None),
        ({"rates": (1e-3, 1e-3), "schedule": schedule(steps_taken=0), "history": FLAT}, None),
        ({"rates": (0.0, 1e-3), "schedule": schedule(steps_taken=0), "history": FELL}, None),
    ],
)  # fmt: skip
def test_a_rate_of_zero(sound: TrainingFacts, changes: Any, beginning: str | None) -> None:
    says("learning_rate_is_zero", changed(sound, **changes), beginning)


@pytest.mark.parametrize(
    ("parts", "rates", "initial", "beginning"),
    [
        (("b",), (0.0, 0.0), None, "error: the learning rate of lora_B is 0"),
        (("saved",), (0.0, 0.0), None, "warning: the learning rate of the head"),
        (("a",), (0.0, 0.0), None, None),
        (("b",), (0.0, 0.1), None, None),
        (("b",), (0.0, 0.0), 1e-3, None),
        (("b",), (0.0, 0.0), 0.0, "error"),
    ],
)
def test_a_group_without_a_rate(
    sound: TrainingFacts, parts: Any, rates: tuple[float, float], initial: float | None, beginning: str | None
) -> None:
    facts = changed(sound)
    (group,) = facts.optimizer.groups
    other = replace(group, index=1, parts=parts, initial_lr=initial)
    steps = tuple(replace(step, rates=(1e-3, rate)) for step, rate in zip(facts.steps, rates, strict=True))
    facts = replace(facts, steps=steps, optimizer=replace(facts.optimizer, groups=(group, other)))
    says("learning_rate_is_zero", facts, beginning)


@pytest.mark.parametrize(
    ("taken", "counted", "history", "beginning"),
    [
        (8, 2, (), "warning: the schedule has come to its end after 8 steps: the learning rate is 0, and the optim"),
        (4, 2, (), "warning"),
        (3, 2, (), "info: the schedule has come to its end after 3 steps"),
        (8, 8, (), "info"),
        (8, 0, (), "info"),
        (8, 2, FELL, "info"),
    ],
)  # fmt: skip
def test_a_schedule_that_outruns_its_optimizer(
    sound: TrainingFacts, taken: int, counted: int, history: Any, beginning: str
) -> None:
    facts = changed(sound, rates=(0.0, 0.0), schedule=schedule(steps_taken=taken), history=history)
    says(
        "learning_rate_is_zero", replace(facts, optimizer=replace(facts.optimizer, steps=counted)), beginning
    )


# ------------------------------------------------------------- LORA371, LORA306

PAIRS = {"optimizer_given": True, "objective": "preferences"}


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({**PAIRS, "rates": (1e-4, 1e-4)}, "info: a learning rate of 0.0001 for chosen against rejected"),
        ({**PAIRS, "rates": (9.9e-5, 9.9e-5)}, None),
        ({**PAIRS, "rates": (1e-4, 1e-4), "optimizer_given": False}, None),
        ({**PAIRS, "rates": (1e-4, 1e-4), "optimizer": "SGD"}, None),
        ({**PAIRS, "rates": (1e-4, 1e-4), "objective": "texts"}, None),
    ],
)
def test_a_rate_of_fine_tuning_for_preferences(
    sound: TrainingFacts, changes: Any, beginning: str | None
) -> None:
    says("learning_rate_is_too_high_for_preferences", changed(sound, **changes), beginning)


@pytest.mark.parametrize(
    ("decay", "beginning"),
    [(5.0, "warning: "), (4.99, None)],
)
def test_a_decay_that_erases(sound: TrainingFacts, decay: float, beginning: str | None) -> None:
    slow = {"weight_decay": decay, "lr": 1e-6}
    says("weight_decay_erases_the_adapter", changed(sound, groups=slow).optimizer, beginning)
