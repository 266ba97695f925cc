"""Each number in the rules on a history, on both sides: on the facts of one curve with single facts changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora import Expect
from pytest_lora.facts.curve import Fall, Jump, Level
from pytest_lora.facts.history import EvalLoss, HistoryFacts, history_facts
from pytest_lora.rules import find


def level(value: float, error: float = 0.01, first: int = 0) -> Level:
    return Level(first, 3, value, error)


def known(losses: int = 60, curve: dict[str, Any] | None = None, **changes: Any) -> HistoryFacts:
    """A flat curve of 10, without noise to speak of, and what is changed of it."""
    facts = history_facts([10 + (37 * i * i % 101) / 1e6 for i in range(losses)])
    assert facts.curve is not None
    flat = {
        "start": level(10),
        "lowest": level(10),
        "highest": level(10),
        "end": level(10),
        "swings": 0,
        "trend": 0.0,
    }
    return replace(facts, curve=replace(facts.curve, **{**flat, **(curve or {})}), **changes)


def said(rule: str, facts: HistoryFacts) -> str | None:
    """The severity of what a rule says, and how it begins."""
    judge = find(rule)
    assert judge is not None
    found = list(judge(facts, Expect()))
    return f"{found[0].severity}: {found[0].observed}" if found else None


def says(rule: str, facts: HistoryFacts, beginning: str | None) -> None:
    observed = said(rule, facts)
    assert (
        observed is None if beginning is None else observed is not None and observed.startswith(beginning)
    ), observed


def evaluations(*losses: float) -> tuple[EvalLoss, ...]:
    return tuple(EvalLoss(10 * (i + 1), loss) for i, loss in enumerate(losses))


def restart_at(index: int, count: int) -> tuple[float, ...]:
    return (2.0, *(9.0 if i >= index else 1.0 for i in range(1, count)))


# ------------------------------------------------------------------ LORA345

UP = {"peak": 13.0, "peak_at": 30, "noise": 0.5}
SHOT_UP = "warning: the loss began at 10, shot up to 13"


@pytest.mark.parametrize(
    ("losses", "curve", "changes", "beginning"),
    [
        (60, UP, {}, SHOT_UP),
        (60, {**UP, "peak": 12.99}, {}, None),
        (60, {**UP, "noise": 0.501}, {}, None),
        (60, {**UP, "noise": 1.2}, {"evals": evaluations(13.1, 10)}, SHOT_UP),
        (60, {**UP, "noise": 1.201}, {"evals": evaluations(13.1, 10)}, None),
        (60, {**UP, "noise": 1.2}, {"evals": evaluations(13.0, 10)}, None),
        (60, {**UP, "noise": 1.2}, {"evals": evaluations(10, 13.1)}, None),
        (60, {**UP, "end": level(11.5)}, {}, SHOT_UP),
        (60, {**UP, "end": level(11.51)}, {}, None),
        (60, UP, {"rates": restart_at(23, 60)}, SHOT_UP),
        (60, UP, {"rates": restart_at(24, 60)}, None),
        (60, UP, {"rates": restart_at(30, 60)}, None),
        (60, UP, {"rates": restart_at(31, 60)}, SHOT_UP),
        (19, {**UP, "peak_at": 9}, {"rates": restart_at(8, 19)}, None),
        (19, {**UP, "peak_at": 9}, {"rates": restart_at(7, 19)}, SHOT_UP),
        (60, UP, {"repetition": 7}, None),
        (
            60,
            {"peak": 0.13, "start": level(0.1), "end": level(0.1), "noise": 0.001},
            {},
            "warning: the loss began at 0.1",
        ),
        (60, {"peak": 0.099, "start": level(0.05), "noise": 0.001}, {}, None),
    ],
)
def test_an_excursion(losses: int, curve: Any, changes: Any, beginning: str | None) -> None:
    says("loss_oscillates", known(losses, curve, **changes), beginning)


@pytest.mark.parametrize(
    ("swings", "restarts", "is_told"), [(2, 0, False), (3, 0, True), (3, 1, False), (4, 1, True)]
)
def test_swings(swings: int, restarts: int, is_told: bool) -> None:
    rates = restart_at(40, 60) if restarts else ()
    assert bool(said("loss_oscillates", known(curve={"swings": swings}, rates=rates))) is is_told


@pytest.mark.parametrize(("swings", "severity"), [(2, "info"), (3, "warning")])
def test_what_new_data_explain_is_an_info(swings: int, severity: str) -> None:
    jumped = {"jump": Jump(50, 1, 2, -5.0), "alternation": 0.9, "deviation": 0.5, "cycles": False}
    says("loss_oscillates", known(curve={**jumped, "swings": swings}), severity)


ALTERNATING = {"alternation": 0.7, "deviation": 0.25, "cycles": False}


@pytest.mark.parametrize(
    ("losses", "curve", "is_told"),
    [
        (20, {}, True),
        (19, {}, False),
        (20, {"alternation": 0.699}, False),
        (20, {"deviation": 0.249}, False),
        (20, {"cycles": True}, False),
        (20, {"end": level(0.101)}, True),
        (20, {"end": level(0.1)}, False),
    ],
)
def test_up_and_down_from_loss_to_loss(losses: int, curve: dict[str, Any], is_told: bool) -> None:
    assert bool(said("loss_oscillates", known(losses, {**ALTERNATING, **curve}))) is is_told


def loud(at: float, times: float, start: float = 60.0, **curve: Any) -> dict[str, Any]:
    """A curve around a level, with so many times the noise of batches of one record."""
    return {
        "levels": (level(at),) * 5,
        "deviation": times * 0.205 * at**-0.45,
        "start": level(start),
        "cycles": False,
        "alternation": 0.0,
        "later_trend": 0.0,
        **curve,
    }


@pytest.mark.parametrize(
    ("losses", "curve", "changes", "is_told"),
    [
        (60, loud(8, 3.51), {}, True),
        (60, loud(8, 3.49), {}, False),
        (30, loud(8, 3.51), {}, True),
        (29, loud(8, 3.51), {}, False),
        (60, loud(8, 3.51, cycles=True), {}, False),
        (60, loud(8, 3.51), {"evals": evaluations(8, 8, 8)}, False),
        (60, loud(8, 9, later_trend=-3.0), {}, True),
        (60, loud(8, 9, later_trend=-3.01), {}, False),
        (60, loud(0.8 * math.log(256) + 0.01, 9), {}, True),
        (60, loud(0.8 * math.log(256) - 0.01, 9), {}, False),
        (60, loud(12.47, 2.1), {}, False),
        (60, loud(12.48, 2.1), {}, True),
        (60, loud(12.48, 1.9), {}, False),
        (60, loud(12.48, 2.1, later_trend=-3.1), {}, False),
        (60, loud(49.9, 9), {}, True),
        (60, loud(50.0, 9), {}, False),
        (60, loud(1.4, 2.1), {"vocabulary_size": 4}, True),
        (60, loud(1.38, 2.1), {"vocabulary_size": 4}, False),
        (60, loud(1.38, 3.6), {"vocabulary_size": 4}, True),
        (60, loud(1.1, 3.6), {"vocabulary_size": 4}, False),
        (60, loud(5.6, 9), {"vocabulary_size": 4}, False),
        (60, loud(2.1, 2.51, start=2.09), {}, True),
        (60, loud(2.1, 2.49, start=2.09), {}, False),
        (60, loud(2.1, 2.51, start=2.1), {}, False),
        (60, loud(2.0, 9, start=1.0), {}, False),
    ],
)
def test_noise_that_no_batch_explains(losses: int, curve: Any, changes: Any, is_told: bool) -> None:
    facts = known(losses, curve, **changes)
    assert bool(said("loss_oscillates", facts)) is is_told


@pytest.mark.parametrize(
    ("evals", "deviation", "is_told"),
    [
        ((1, 2, 1, 2, 1), 0.2, True),
        ((1, 2, 1, 2, 1), 0.199, False),
        ((1, 1.99, 1, 2, 1), 0.2, False),
        ((1, 2, 1, 2), 0.2, False),
        ((1, 2, 1), 0.2, False),
        ((1, 2, 1, 2, 1, 0), 0.2, False),
        ((0.02, 0.09, 0.02, 0.09, 0.02), 0.2, False),
        ((0.02, 0.11, 0.02, 0.11, 0.02), 0.2, True),
    ],
)
def test_evaluations_that_double_and_halve_twice(evals: Any, deviation: float, is_told: bool) -> None:
    curve = {"deviation": deviation, "alternation": 0.0}
    assert bool(said("loss_oscillates", known(20, curve, evals=evaluations(*evals)))) is is_told


# ------------------------------------------------------------------ LORA342


@pytest.mark.parametrize(
    ("losses", "is_told"),
    [
        ([1.0, 1.2, 2.0, 2.0, 2.0], True),
        ([1.2, 2.4, 2.6, 2.7], False),
        ([1.0, 1.2, 2.0, 2.0, 1.99], False),
        ([1.0, 5.0, 5.5, 5.5, 5.5], False),
        ([1.0, 5.0, 5.5, 5.51, 5.51], True),
        ([0.01, 0.02, 0.1, 0.1, 0.1], True),
        ([0.01, 0.02, 0.1, 0.1, 0.099], False),
        ([0.0, 0.02, 0.1, 0.1, 0.1], True),
        ([-0.1, 0.02, 0.1, 0.1, 0.1], False),
        ([1.0, 1.2, *[2.0, 2.1] * 8, 2.0], True),
    ],
)
def test_a_short_history_doubles(losses: list[float], is_told: bool) -> None:
    facts = replace(known(), usable=tuple(losses), curve=None)
    assert bool(said("loss_diverges", facts)) is is_told
    twenty = replace(facts, usable=(*losses[:2], *[losses[-1]] * 18))
    assert said("loss_diverges", twenty) is None


def low_first(low: int, few: int = 2, count: int = 100) -> tuple[float, ...]:
    """Losses whose first few are 1, and some in the middle too; all others are 2."""
    return tuple(1.0 if i < few or 50 <= i < 50 + low else 2.0 for i in range(count))


ROSE = {"lowest": level(10, 0.3), "start": level(10, 0.01), "end": level(12.51, 0.4)}
BEGAN = "error: the loss began at"


@pytest.mark.parametrize(
    ("curve", "changes", "beginning"),
    [
        (ROSE, {}, BEGAN),
        ({**ROSE, "end": level(12.5, 0.4)}, {}, None),
        ({**ROSE, "lowest": level(10.42, 0.3), "end": level(13, 0.4)}, {}, BEGAN),
        ({**ROSE, "start": level(10, 1.2), "end": level(12.55, 0.4)}, {}, BEGAN),
        ({**ROSE, "start": level(10, 1.3), "end": level(12.55, 0.4)}, {}, None),
        ({**ROSE, "start": level(10.4, 0.01)}, {}, BEGAN),
        ({**ROSE, "start": level(10.43, 0.01)}, {}, None),
        ({"end": level(12.01, 9), "trend": 5.01}, {}, BEGAN),
        ({"end": level(12.01, 9), "trend": 5.0}, {}, None),
        ({"end": level(12.0, 9), "trend": 5.01}, {}, None),
        ({"start": level(0.05), "end": level(0.1, 9), "trend": 6.0}, {}, BEGAN),
        ({"start": level(0.05), "end": level(0.0999, 9), "trend": 6.0}, {}, None),
        ({**ROSE, "jump": Jump(50, 1, 2, -5.0)}, {}, None),
        ({"start": level(3), "end": level(1.21)}, {"usable": low_first(1)}, BEGAN),
        ({"start": level(3), "end": level(1.2)}, {"usable": low_first(1)}, None),
        ({"start": level(3), "end": level(1.21)}, {"usable": low_first(2)}, None),
        ({"start": level(3), "end": level(1.21)}, {"usable": low_first(1, few=3)}, BEGAN),
        ({"start": level(3), "end": level(1.21)}, {"usable": low_first(1, few=5)}, BEGAN),
        ({"start": level(3), "end": level(1.21)}, {"usable": low_first(1, few=8)}, None),
        ({"start": level(3), "end": level(1.21)}, {"usable": low_first(0, count=20)}, BEGAN),
    ],
)
def test_a_curve_ends_above_its_start(curve: Any, changes: Any, beginning: str | None) -> None:
    says("loss_diverges", known(100, curve, **changes), beginning)


TOGETHER = {"start": level(10), "end": level(10.51), "trend": 3.01, "lowest": level(10)}
BOTH = "warning: the training loss rose from 10 to 10.5"


@pytest.mark.parametrize(
    ("curve", "evals", "beginning"),
    [
        ({}, [10 + i / 10 for i in range(7)], BOTH),
        ({}, [10 + i / 10 for i in range(6)], None),
        ({"trend": 3.0}, [10 + i / 10 for i in range(7)], None),
        ({"end": level(10.5)}, [10 + i / 10 for i in range(7)], None),
        ({}, [10 + i / 12 for i in range(7)], None),
        ({}, [10 + i / 11.9 for i in range(7)], BOTH),
    ],
)
def test_training_and_evaluation_rise_together(curve: Any, evals: list[float], beginning: str | None) -> None:
    says("loss_diverges", known(curve={**TOGETHER, **curve}, evals=evaluations(*evals)), beginning)


def blown_up(count: int = 61, low: int = 0, second: float = 2.0) -> tuple[float, ...]:
    rest = [second, 2.5, 3.0, 3.0, 3.0, 3.0] + [1.5] * (count - 7)
    rest[-5 : -5 + low] = [1.0] * low
    return (1.0, *rest)


@pytest.mark.parametrize(
    ("usable", "curve", "is_told"),
    [
        (blown_up(), {}, True),
        (blown_up(), {"noise": 0.2}, False),
        (blown_up(), {"end": level(2.31)}, False),
        (blown_up(), {"end": level(2.3)}, True),
        (blown_up(), {"end": level(1.2)}, True),
        (blown_up(), {"end": level(1.19)}, False),
        (blown_up(low=1), {}, True),
        (blown_up(low=2), {}, False),
        (blown_up(second=2.5), {}, False),
        (blown_up(second=2.4), {"noise": 0.01}, True),
        (blown_up(21), {"noise": 0.01}, True),
        (blown_up(20), {"noise": 0.01}, False),
    ],
)
def test_a_loss_blows_up_at_once(usable: tuple[float, ...], curve: Any, is_told: bool) -> None:
    settled = {"start": level(1.0, 9), "end": level(1.5), "lowest": level(1.0, 9), "noise": 0.19} | curve
    for times in (1.0, 4.0):  # a loss is no better for being larger as a whole
        scaled = {
            name: replace(one, value=times * one.value) if isinstance(one, Level) else times * one
            for name, one in settled.items()
        }
        facts = known(curve=scaled, usable=tuple(times * loss for loss in usable))
        assert bool(said("loss_diverges", facts)) is is_told


@pytest.mark.parametrize(
    ("curve", "severity"),
    [
        ({"lowest": level(2), "end": level(4.01)}, "warning: the loss fell from 10 to 2"),
        ({"lowest": level(2), "end": level(4.0)}, None),
        ({"lowest": level(2), "end": level(6.0)}, "warning"),
        ({"lowest": level(2), "end": level(6.01)}, "error"),
        ({"lowest": level(8), "end": level(9.7)}, None),
        ({"lowest": level(7.99), "end": level(9.7)}, "error"),
        ({"lowest": level(2), "end": level(6.01), "swings": 2}, "error"),
        ({"lowest": level(2, 3.9), "end": level(9.9, 0.01), "start": level(10, 0.01)}, None),
        ({"lowest": level(2), "end": level(6.01, 0.79)}, "error"),
        ({"lowest": level(2), "end": level(2.39), "start": level(2.6)}, None),
        ({"lowest": level(2), "end": level(2.41), "start": level(2.6)}, "error"),
        ({"lowest": level(2), "end": level(6.01, 0.81)}, None),
        ({"lowest": level(2), "end": level(6.01), "start": level(10, 3.9)}, "error"),
        ({"lowest": level(2, 0.0), "end": level(6.01), "start": level(10, 4.0)}, None),
        ({"lowest": level(2), "end": level(6.01), "start": level(10, 4.1)}, None),
    ],
)
def test_a_fall_is_given_back(curve: dict[str, Any], severity: str | None) -> None:
    says("loss_diverges", known(curve=curve), severity)
    assert said("loss_diverges", known(curve={**curve, "swings": 3})) is None


# ------------------------------------------------------------------ LORA344


def fall(size: float, at: int = 20, error: float = 0.0, resolution: float = 0.0) -> Fall:
    return Fall(at, size, error, resolution)


FLAT = {"fall": fall(0.29), "trend": 0.0}
NOT_FALLEN = "warning: the loss began at 10 and has not fallen by 3%"


@pytest.mark.parametrize(
    ("losses", "curve", "changes", "beginning"),
    [
        (100, {}, {}, NOT_FALLEN),
        (99, {}, {}, "info"),
        (50, {}, {}, "info"),
        (49, {}, {}, None),
        (20, {}, {"total_steps": 100}, NOT_FALLEN),
        (19, {}, {"total_steps": 19}, None),
        (30, {}, {"total_steps": 200}, NOT_FALLEN),
        (30, {}, {"total_steps": 201}, "info"),
        (30, {}, {"total_steps": 300}, "info"),
        (30, {}, {"total_steps": 301}, None),
        (100, {"fall": fall(0.3)}, {}, None),
        (100, {"fall": fall(0.49, error=0.2)}, {}, NOT_FALLEN),
        (100, {"fall": fall(0.5, error=0.2)}, {}, None),
        (100, {"fall": fall(0.74, at=9, error=0.25)}, {}, NOT_FALLEN),
        (100, {"fall": fall(0.75, at=9, error=0.25)}, {}, None),
        (100, {"fall": fall(0.65, at=10, error=0.25)}, {}, None),
        (100, {"fall": fall(0.29, resolution=0.169)}, {}, NOT_FALLEN),
        (100, {"fall": fall(0.29, resolution=0.171)}, {}, None),
        (100, {"highest": level(10.99), "lowest": level(10)}, {}, NOT_FALLEN),
        (100, {"highest": level(11), "lowest": level(10)}, {}, None),
        (100, {"highest": level(12.4, 0.4), "lowest": level(10, 0.3)}, {}, NOT_FALLEN),
        (100, {"highest": level(12.5, 0.4), "lowest": level(10, 0.3)}, {}, None),
        (100, {"end": level(0.099)}, {}, None),
        (100, {"end": level(0.1)}, {}, NOT_FALLEN),
        (100, {}, {"repetition": 3}, None),
    ],
)
def test_a_plateau(losses: int, curve: Any, changes: Any, beginning: str | None) -> None:
    says("loss_stays_on_a_plateau", known(losses, {**FLAT, **curve}, **changes), beginning)


@pytest.mark.parametrize(
    ("total", "severity"), [(None, "info"), (101, "warning"), (200, "warning"), (201, "info")]
)
def test_a_warm_up_up_to_half_of_the_run_is_waited_for(total: int | None, severity: str) -> None:
    rates = tuple(float(i + 1) for i in range(100))
    says("loss_stays_on_a_plateau", known(100, FLAT, rates=rates, total_steps=total), severity)


MOVED = "warning: the evaluation loss moved by less than 2%"
WIDE = {"highest": level(20), "lowest": level(5), "fall": fall(0.29), "trend": 0.0}


@pytest.mark.parametrize(
    ("curve", "evals", "beginning"),
    [
        ({}, (5, 5, 5), MOVED),
        ({"trend": -2.99}, (5, 5, 5), MOVED),
        ({"trend": -3.0}, (5, 5, 5), None),
        ({"fall": fall(0.3)}, (5, 5, 5), None),
        ({}, (5, 5, 4.8), None),
    ],
)
def test_flat_evaluations(curve: Any, evals: tuple[float, ...], beginning: str | None) -> None:
    says("loss_stays_on_a_plateau", known(100, {**WIDE, **curve}, evals=evaluations(*evals)), beginning)


def early_best(step: int, *later: float, best: float = 2.0) -> tuple[EvalLoss, ...]:
    after = (EvalLoss(50 + i, loss) for i, loss in enumerate(later))
    return (EvalLoss(step, best), *after)


WORSE = (2.04, 2.04, 2.1, 2.2, 2.2)
NEVER_AGAIN = "warning: the evaluation loss was"


@pytest.mark.parametrize(
    ("evals", "curve", "beginning"),
    [
        (early_best(40, *WORSE), {}, NEVER_AGAIN),
        (early_best(41, *WORSE), {}, None),
        (early_best(40, *WORSE[1:]), {}, None),
        (early_best(40, 2.03, *WORSE[1:]), {}, None),
        (early_best(40, *WORSE[:2], 2.09, *WORSE[3:]), {}, None),
        (early_best(40, *WORSE), {"trend": 3.0}, NEVER_AGAIN),
        (early_best(40, *WORSE), {"trend": 3.01}, None),
        (early_best(40, *WORSE), {"end": level(9.53)}, NEVER_AGAIN),
        (early_best(40, *WORSE), {"end": level(9.52)}, None),
        (early_best(40, *(10 * loss for loss in WORSE), best=0.1), {}, NEVER_AGAIN),
        (early_best(40, *(10 * loss for loss in WORSE), best=0.099), {}, None),
    ],
)
def test_no_better_than_an_early_evaluation(evals: Any, curve: Any, beginning: str | None) -> None:
    facts = known(120, {**WIDE, "fall": fall(5.0), **curve}, evals=evals)
    says("loss_stays_on_a_plateau", facts, beginning)


# ------------------------------------------------------------------ LORA346


def two_levels(before: float, after: float, error: float = 0.1) -> dict[str, Any]:
    return {"levels": (level(before, error, first=9), level(after, error, first=49)), "jump": None}


OVERFITS = "warning: the evaluation loss was"


@pytest.mark.parametrize(
    ("evals", "levels", "changes", "beginning"),
    [
        ((2.0, 2.1, 2.1, 2.1, 2.1), two_levels(10, 9.4), {}, OVERFITS),
        ((20.0, 20.9, 20.9, 20.9, 20.9), two_levels(10, 9.4), {}, "info"),
        ((50.0, 51.0, 51.0, 51.0, 51.0), two_levels(10, 9.4), {}, "info"),
        ((50.0, 50.9, 50.9, 50.9, 50.9), two_levels(10, 9.4), {}, None),
        ((5.0, 6.0, 6.0, 6.0), two_levels(10, 9.4), {}, OVERFITS),
        ((5.0, 6.01, 6.01), two_levels(10, 9.4), {}, "info"),
        ((5.0, 5.99, 5.99), two_levels(10, 9.4), {}, None),
        ((5.0, 6.0), two_levels(10, 9.4), {}, None),
        ((0.0, 6.0, 6.0), two_levels(10, 9.4), {}, None),
        ((2.0, 9.0, 2.01, 9.0), two_levels(10, 9.4), {}, None),
        ((5.0, 6.0, 6.0, 6.0), two_levels(10, 9.5), {}, None),
        ((5.0, 6.0, 6.0, 6.0), two_levels(10, 9.4, 0.142), {}, None),
        ((5.0, 6.0, 6.0, 6.0), two_levels(10, 9.4, 0.141), {}, OVERFITS),
        ((5.0, 6.0, 6.0, 6.0), two_levels(2.9, 2.9), {}, OVERFITS),
        ((5.0, 6.0, 6.0, 6.0), two_levels(3.0, 3.0), {}, None),
        ((5.0, 6.0, 6.0, 6.0), two_levels(2.0, 2.42), {}, OVERFITS),
        ((5.0, 6.0, 6.0, 6.0), two_levels(2.0, 2.43), {}, None),
        ((5.0, 6.0, 6.0, 6.0), two_levels(10, 9.4), {"jump": Jump(50, 1, 2, -5.0)}, None),
        ((9.0, 5.0, 6.0, 6.0, 6.0), two_levels(10, 9.4), {"jump": Jump(50, 1, 2, -5.0)}, None),
    ],
)
def test_overfitting(evals: Any, levels: Any, changes: Any, beginning: str | None) -> None:
    spread = tuple(replace(one, step=10 + 10 * i) for i, one in enumerate(evaluations(*evals)))
    # The last lies where the second level is, whatever their number.
    spread = (*spread[:-1], replace(spread[-1], step=51))
    says("overfits_the_training_set", known(60, {**levels, **changes}, evals=spread), beginning)


def test_overfitting_of_few_losses_goes_by_single_ones() -> None:
    for last, is_told in ((9.4, True), (9.5, False)):
        facts = known(usable=(10.0, 9.9, 9.8, last), train=(10.0, 9.9, 9.8, last))
        few = replace(
            facts,
            curve=None,
            evals=tuple(EvalLoss(i, loss) for i, loss in ((1, 5.0), (2, 6.0), (3, 6.0), (4, 6.0))),
        )
        assert bool(said("overfits_the_training_set", few)) is is_told


@pytest.mark.parametrize(("at", "is_told"), [(29, True), (30, False)])
def test_a_jump_before_the_evaluation_before_the_best_explains_nothing(at: int, is_told: bool) -> None:
    evals = tuple(
        EvalLoss(step, loss) for step, loss in ((30, 6.0), (40, 5.0), (50, 6.0), (60, 6.0), (61, 6.0))
    )
    levels = (level(10, 0.1, first=38), level(9.4, 0.1, first=58))
    curve = {"levels": levels, "jump": Jump(at, 1, 2, -5.0)}
    assert bool(said("overfits_the_training_set", known(60, curve, evals=evals))) is is_told


# ------------------------------------------------------------------ LORA341, LORA343, LORA347


@pytest.mark.parametrize(
    ("losses", "severity"),
    [
        ([0.011, 0.0, 0.0], "error"),
        ([0.01, 0.0, 0.0], "error"),
        ([0.0099, 0.0, 0.0], None),
        ([0.0, 0.0], "warning"),
    ],
)
def test_zeros_after_a_loss_that_rounds_to_none(losses: list[float], severity: str | None) -> None:
    says("loss_drops_to_exactly_zero", history_facts(losses), severity)
    assert said("loss_drops_to_exactly_zero", history_facts(losses, zero_has_gradient=True)) is None


@pytest.mark.parametrize(
    ("losses", "severity"),
    [
        ([0.01] * 5, "warning: all 5 losses are 0.01"),
        ([0.0099] * 5, None),
        ([-0.01] * 5, "warning"),
        ([0.6931] * 9, "info"),
        ([0.6931] * 10, "warning"),
        ([0.5] * 9, "info"),
        ([0.50009] * 9, "info"),
        ([0.50011] * 9, "warning"),
        ([0.5, 0.6] * 4, "warning: the same 2 losses come again to the last digit over all 8"),
    ],
)
def test_losses_that_never_move(losses: list[float], severity: str | None) -> None:
    says("loss_never_moves", history_facts(losses), severity)


@pytest.mark.parametrize(
    ("evals", "changes", "is_told"),
    [
        ((2.4683, 2.4683, 2.4683), {}, True),
        ((2.4683, 2.4683), {}, False),
        ((3.1, 3.0, 2.9, 2.4683, 2.4683, 2.4683), {}, True),
        ((3.2, 3.1, 3.0, 2.9, 2.4683, 2.4683, 2.4683), {}, False),
        ((2.4683, 2.4683, 2.4683, 2.4682), {}, False),
        ((2.47, 2.47, 2.47), {}, False),
        ((0.6931, 0.6931, 0.6931), {}, False),
        ((0.10008, 0.10008, 0.10008), {}, False),
        ((0.10052, 0.10052, 0.10052), {}, True),
        ((0.09952, 0.09952, 0.09952), {}, False),
        ((), {}, False),
    ],
)
def test_evaluations_that_never_move(
    evals: tuple[float, ...], changes: dict[str, Any], is_told: bool
) -> None:
    facts = known(evals=evaluations(*evals), **changes)
    assert (said("loss_never_moves", facts) or "").startswith("warning: the last ") is is_told


AGAIN = [5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0]
"""Medians of 5, 4 and 2.5, after 3, 3 and 6 losses."""


@pytest.mark.parametrize(
    ("after", "changes", "is_told"),
    [
        (AGAIN, {}, True),
        ([1.15 * loss for loss in AGAIN], {}, True),
        ([1.16 * loss for loss in AGAIN], {}, False),
        ([0.84 * loss for loss in AGAIN], {}, False),
        (AGAIN[:11], {}, False),
        ([*AGAIN[:6], *[2.0] * 6], {}, False),
        (AGAIN, {"jump": None}, False),
        (AGAIN, {"jump": Jump(12, 4.01, 5.0, -5.0)}, False),
        (AGAIN, {"jump": Jump(12, 4.0, 5.0, 0.0)}, True),
        (AGAIN, {"swings": 1}, True),
        (AGAIN, {"swings": 2}, False),
    ],
)
def test_a_loss_that_starts_over(after: list[float], changes: dict[str, Any], is_told: bool) -> None:
    """New data raise a loss to a level of their own; a new adapter goes the old way."""
    curve = {"start": level(5.0), "jump": Jump(12, 2.0, 5.0, -5.0), **changes}
    facts = known(24, curve, usable=(*AGAIN, *after))
    assert bool(said("loss_starts_over", facts)) is is_told
    assert said("loss_starts_over", replace(facts, repetition=12)) is None
    restarts = [
        bool(said("loss_starts_over", replace(facts, rates=restart_at(at, 24)))) for at in (9, 10, 12, 13)
    ]
    assert restarts == [is_told, False, False, is_told]


CHANCE = math.log(4)


@pytest.mark.parametrize(
    ("losses", "curve", "changes", "is_told"),
    [
        (100, {}, {}, True),
        (99, {}, {}, False),
        (20, {}, {"total_steps": 40}, True),
        (20, {}, {"total_steps": 41}, False),
        (19, {}, {"total_steps": 19}, False),
        (100, {"end": level(0.971 * CHANCE)}, {}, True),
        (100, {"end": level(0.97 * CHANCE)}, {}, False),
        (100, {"end": level(1.099 * CHANCE)}, {}, True),
        (100, {"end": level(1.1 * CHANCE)}, {}, False),
        (
            100,
            {"end": level(0.81 * math.log(256))},
            {"vocabulary_size": 256, "evals": evaluations(4, 4, 4)},
            True,
        ),
        (
            100,
            {"end": level(0.8 * math.log(256))},
            {"vocabulary_size": 256, "evals": evaluations(4, 4, 4)},
            False,
        ),
        (
            100,
            {"end": level(0.81 * math.log(256))},
            {"vocabulary_size": 256, "evals": evaluations(4, 4, 4.1)},
            False,
        ),
        (
            100,
            {"end": level(0.81 * math.log(63))},
            {"vocabulary_size": 63, "evals": evaluations(4, 4, 4)},
            False,
        ),
        (100, {"trend": -3.0}, {}, False),
        (100, {}, {"vocabulary_size": None}, False),
        (100, {}, {"repetition": 2}, False),
        (100, {}, {"usable": tuple(10 - i / 10 for i in range(100))}, False),
        (100, {}, {"usable": (*(10 - i / 10 for i in range(50)), *[1.0] * 50)}, True),
    ],
)
def test_a_loss_settles_at_chance(losses: int, curve: Any, changes: Any, is_told: bool) -> None:
    settled = {"end": level(CHANCE), "trend": -3.01}
    facts = known(losses, {**settled, **curve}, **{"vocabulary_size": 4, **changes})
    assert bool(said("loss_settles_at_chance", facts)) is is_told


@pytest.mark.parametrize(
    ("losses", "still", "is_told"),
    [
        (100, 20, True),
        (100, 19, False),
        (300, 30, True),
        (300, 29, False),
        (100, 100, False),
        (100, 0, False),
    ],
)
def test_a_schedule_that_ended(losses: int, still: int, is_told: bool) -> None:
    facts = known(losses, rates=(2e-4,) * (losses - still) + (0.0,) * still)
    beginning = f"warning: the learning rate is 0 since step {losses - still}, for {still} steps"
    says("schedule_ends_before_training", facts, beginning if is_told else None)
