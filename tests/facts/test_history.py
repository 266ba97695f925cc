"""What a history says of a run, at the bounds of each statement."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pytest_lora.facts.history import EvalLoss, history_facts


@pytest.mark.parametrize(
    ("rates", "restarts"),
    [
        ([1, 2, 4, 8], ()),  # a warm-up alone
        ([4, 2, 5], (2,)),
        ([4, 2, 4], ()),  # twice is no more than twice
        ([1, 4, 2, 1, 9, 9], (4,)),
        ([1, 9, 4, 9, 4, 9], (3, 5)),
        ([4, 4, 2, 2, 5], (4,)),
        ([4], ()),
        ([], ()),
    ],
)
def test_a_restart_more_than_doubles_the_rate_after_a_fall(
    rates: list[float], restarts: tuple[int, ...]
) -> None:
    losses = [2.0] * max(1, len(rates))
    assert history_facts(losses, learning_rate=rates or None).restarts == restarts


@pytest.mark.parametrize(
    ("rates", "warming"),
    [
        ([1, 2, 3], True),
        ([1, 3, 3], False),
        ([1, 2, 4, 3], False),
        ([3, 3, 3], False),
        ([2, 1, 3], True),
        ([1], False),
    ],
)
def test_a_warm_up_ends_when_the_second_half_stays(rates: list[float], warming: bool) -> None:
    facts = history_facts([2.0] * len(rates), learning_rate=rates)
    assert facts.is_warming_up is warming
    assert not history_facts([2.0] * len(rates), learning_rate=1.0).is_warming_up


def test_steps_trained_leave_out_what_had_less_than_a_tenth_of_the_peak() -> None:
    rates = [0.05, 0.1, 0.5, 1.0, 0.1, 0.0999]
    facts = history_facts([2.0] * 6, learning_rate=rates, steps_per_loss=5)
    assert facts.steps_trained == 20
    assert history_facts([2.0] * 5 + [math.nan], learning_rate=rates, steps_per_loss=5).steps_trained == 20
    assert (
        history_facts([2.0] * 4 + [math.nan] * 2, learning_rate=rates, steps_per_loss=5).steps_trained == 15
    )
    for rate in (None, 1.0, 0.0, [0.0] * 6):
        assert history_facts([2.0] * 6, learning_rate=rate, steps_per_loss=5).steps_trained == 30


def test_steps_and_shares_are_counted_from_the_first_loss() -> None:
    facts = history_facts([2.0] * 9 + [math.nan], steps_per_loss=10, total_steps=200)
    assert [facts.step(i) for i in (0, 1, 9)] == [10, 20, 100]
    assert facts.steps == 90
    assert facts.share_seen == 0.45
    assert history_facts([2.0, 2.0]).steps == 2
    assert history_facts([2.0]).share_seen is None
    assert history_facts([2.0], vocabulary_size=256).chance == math.log(256)
    assert history_facts([2.0]).chance is None


@pytest.mark.parametrize(
    ("evals", "flat"),
    [
        ([2.0, 2.0], False),
        ([2.0] * 3, True),
        ([1.0, 0.99, 1.0], True),
        ([50.0, 50.0, 49.0], False),
        ([0.0] * 3, False),
    ],
)
def test_evaluations_are_flat_within_two_hundredths(evals: list[float], flat: bool) -> None:
    assert history_facts([2.0], evals).evals_are_flat is flat


@pytest.mark.parametrize(
    ("losses", "zero_from", "usable"),
    [
        ([1.0, 0.0], None, 2),
        ([1.0, 0.0, 0.0], 1, 1),
        ([0.0, 0.0], 0, 0),
        ([0.0, 1.0, 0.0, 0.0, 0.0], 2, 2),
        ([1.0, math.inf, 0.0, 0.0], 2, 1),
        ([1.0, 1.0, math.nan], None, 2),
    ],
)
def test_what_can_be_used_ends_at_the_first_fault(
    losses: list[float], zero_from: int | None, usable: int
) -> None:
    facts = history_facts(losses)
    assert facts.zero_from == zero_from
    assert facts.usable == tuple(losses[:usable])


@pytest.mark.parametrize(
    ("losses", "has_curve"),
    [([1.0] * 9, False), ([1.0] * 10, True), ([1.0] * 9 + [0.0], True), ([1.0] * 9 + [-0.1], False)],
)
def test_a_curve_has_ten_losses_and_none_below_zero(losses: list[float], has_curve: bool) -> None:
    assert (history_facts(losses).curve is not None) is has_curve


def test_the_training_loss_around_a_step() -> None:
    few = history_facts([5.0, 4.0, 3.0], steps_per_loss=10)
    wanted = {0: 5.0, 10: 5.0, 14: 5.0, 16: 4.0, 20: 4.0, 30: 3.0, 31: 3.0, 900: 3.0}
    assert {step: few.train_at(step) for step in wanted} == wanted
    assert few.level_at(10) is None
    assert history_facts([math.nan]).train_at(1) is None
    many = history_facts([100.0 - i for i in range(60)], steps_per_loss=10)
    for step in range(20, 601, 10):
        found = many.level_at(step)
        assert found is not None
        assert abs(found.middle - (step // 10 - 1)) <= 1  # every third loss is in the middle of a level
        assert many.train_at(step) == found.value


@pytest.mark.parametrize(
    ("given", "steps"),
    [([2.0], [60]), ([2.0, 1.0], [30, 60]), ([3.0, 2.0, 1.0], [20, 40, 60]), ({50: 1.0, 0: 2.0}, [0, 50])],
)
def test_evaluations_without_steps_are_spread_over_the_run(given: Any, steps: list[int]) -> None:
    facts = history_facts([2.0] * 6, given, steps_per_loss=10)
    assert [one.step for one in facts.evals] == steps
    assert sorted((one.loss for one in facts.evals), reverse=True) == [one.loss for one in facts.evals]


def test_evaluations_that_are_not_finite_are_told_apart() -> None:
    facts = history_facts([2.0], {1: math.nan, 2: 1.0, 3: math.inf})
    assert facts.evals == (EvalLoss(2, 1.0),)
    assert facts.nonfinite_evals == (1, 3)
    assert facts.nonfinite == ()


def test_the_bounds_of_arguments() -> None:
    facts = history_facts([2.0], {0: 1.0}, vocabulary_size=2, total_steps=1, learning_rate=0.0)
    assert (facts.vocabulary_size, facts.total_steps, facts.learning_rate) == (2, 1, 0.0)
    assert history_facts([2.0, 2.0], learning_rate=[0.0, 0.5]).learning_rate == 0.5
    for wrong in (math.inf, math.nan, -0.1, [0.1, -0.1]):
        with pytest.raises(ValueError, match="learning_rate must be a finite number of at least 0"):
            history_facts([2.0, 2.0], learning_rate=wrong)
