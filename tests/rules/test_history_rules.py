"""The rules on a history of losses, and the laws that their statistics obey."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from pytest_lora import Expect, Report, diagnose_history
from pytest_lora.facts.curve import (
    clearest_fall,
    cycles,
    deviations,
    jump,
    level,
    levels,
    noise,
    repetition,
    swings,
    trend,
)
from pytest_lora.facts.curve_shape import FITS
from pytest_lora.facts.history import history_facts

RUNS = Path(__file__).parents[2] / "benchmarks" / "results" / "history_runs.json"

losses = st.floats(0.2, 20, allow_subnormal=False)
histories = st.lists(losses, min_size=1, max_size=60)


def codes(report: Report) -> dict[str, str]:
    return {f.code: f.severity for f in report.findings}


def noisy(trend: list[float], spread: float, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [loss * (1 + rng.gauss(0, spread)) for loss in trend]


FALL = [4.0 * 0.97**i + 0.5 for i in range(80)]


# ------------------------------------------------------------------ each rule, where it speaks and where not


def test_a_small_part_of_the_fall_is_lost_where_evaluations_say_so() -> None:
    """A rate that grew too large: 19 % of the fall is given back, and the held-out records get as much worse."""
    curve = noisy([1.2 + 2.3 * 0.95**i for i in range(130)] + [1.65] * 60, 0.03)
    evals = [3.4, 2.6, 1.6, 1.3, 1.24, 1.2, 1.2, 1.8, 1.77, 1.62]
    assert codes(diagnose_history(curve, evals)) == {"LORA342": "warning"}
    assert not codes(diagnose_history(curve))
    assert not codes(diagnose_history(curve, [*evals[:7], 1.3, 1.3, 1.8])), "one evaluation of hard records"


def test_evaluations_that_climb_one_by_one_are_overfitting_however_slowly() -> None:
    climbing = [4.5, 3.6, 3.3, 3.1, 3.0, 3.02, 3.03, 3.04, 3.06, 3.07, 3.08, 3.09, 3.1]
    assert codes(diagnose_history(noisy(FALL, 0.05), climbing)) == {"LORA346": "warning"}
    wandering = [4.5, 3.6, 3.3, 3.1, 3.0, 3.08, 3.07, 3.08, 3.07, 3.08, 3.07, 3.08, 3.07]
    assert codes(diagnose_history(noisy(FALL, 0.05), wandering)) == {"LORA346": "info"}


def test_noise_of_a_loss_in_another_unit_is_not_judged() -> None:
    """A squared error begins far above any guess of a token, and its batches differ more than those of texts."""

    def said(start: float) -> str:
        return str(diagnose_history([start, start, start, *(abs(n) for n in noisy([28.0] * 197, 0.4))]))

    assert "scatters" in said(30.0)
    assert "scatters" not in said(600.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    report = diagnose_history([2.0, 1.9, value], steps_per_loss=10)
    assert codes(report) == {"LORA340": "error"}
    assert "step 30" in str(report)
    assert codes(diagnose_history([value])) == {"LORA340": "error"}
    assert codes(diagnose_history([2.0, 1.9], [1.9, value])) == {"LORA340": "error"}


def test_exactly_zero() -> None:
    assert codes(diagnose_history([1.0778, 0.0, 0.0])) == {"LORA341": "error"}
    assert codes(diagnose_history([0.0] * 4)) == {"LORA341": "warning"}, "as GRPO logs it, too"
    assert not diagnose_history([1.1, 0.0]).findings, "one zero may be one batch"
    assert not diagnose_history([1.1, 0.0, 0.0, 1.0, 0.9]).findings, "it came back"
    assert not diagnose_history([2.0, 0.3, 0.02, 0.001, 0.0001, 0.0, 0.0, 0.0]).findings, "rounded"


def test_zeros_among_other_losses_are_batches_without_a_target() -> None:
    falls = noisy([1.0 + 2.0 * 0.9**i for i in range(40)], 0.05)
    falls[12] = falls[30] = 0.0
    assert codes(diagnose_history(falls)) == {"LORA341": "warning"}
    assert "step 26" in str(diagnose_history(falls, steps_per_loss=2)), "the first of them"
    assert not codes(diagnose_history([*falls[:12], *falls[13:]])), "one zero"
    easy = [0.2, *falls]
    assert not codes(diagnose_history(easy)), "a batch may be as easy as that"
    assert not codes(diagnose_history([loss / 20 for loss in falls])), "a loss so low is rounded to zero"


def test_zeros_of_either_sign_are_those_of_a_policy_gradient() -> None:
    assert not codes(diagnose_history([-0.0, 0.0, -0.0, -0.0, 0.0]))
    assert codes(diagnose_history([-0.0] * 5)) == {"LORA341": "warning"}, (
        "a hand-made mean may be -0.0 throughout"
    )


STAGE = [0.4 + 1.2 * 0.9**i for i in range(40)]
WORSE = noisy([*STAGE, *(3.0 + 4.0 * 0.95**i for i in range(40))], 0.03)


def test_a_jump_of_other_data_is_none_where_the_evaluation_was_lost() -> None:
    falls, lost = [1.5, 1.1, 0.8, 0.6, 0.55, 0.5, 0.48, 0.47], [1.5, 1.1, 0.8, 0.6, 0.55, 2.0, 2.2, 2.1]
    assert codes(diagnose_history(WORSE, falls)) == {"LORA345": "info"}
    assert codes(diagnose_history(WORSE, lost)) == {"LORA342": "error", "LORA345": "info"}
    again = [*lost[:5], 2.0, 0.9, 0.6]
    assert codes(diagnose_history(WORSE, again)) == {"LORA345": "info"}, "it is learned again"


def test_a_jump_of_other_data_is_none_where_it_ends_at_a_guess() -> None:
    assert "LORA342" in codes(diagnose_history(WORSE, vocabulary_size=3_000)), "6.7 of 8.0"
    assert "LORA342" not in codes(diagnose_history(WORSE, vocabulary_size=128_256)), (
        "6.7 of 11.8: a hard text"
    )


def test_data_may_change_more_than_once() -> None:
    harder = [1.0 + 3.0 * 0.9**i for i in range(40)]
    hardest = [2.2 + 4.0 * 0.9**i for i in range(40)]
    assert "LORA342" not in codes(diagnose_history(noisy([*STAGE, *harder, *hardest], 0.03)))
    assert "LORA342" in codes(diagnose_history(noisy([*STAGE, *harder, *hardest[::-1]], 0.03)))


def test_a_running_mean_of_noise_strays_and_does_not_diverge() -> None:
    for seed in (8, 20, 23, 28):
        raw = [math.exp(value) for value in noisy([-2.6] * 800, 0.29, seed)]
        means = [sum(raw[max(0, i - 99) : i + 1]) / min(100, i + 1) for i in range(0, 800, 4)]
        assert not codes(diagnose_history(means))


def test_an_evaluation_at_the_start_is_no_excursion() -> None:
    """The first three losses lie low by chance; the evaluation at the first step says where the run began."""
    losses = noisy([1.1 + 0.8 * 0.99**i for i in range(400)], 0.2)
    losses[:3] = [1.3, 1.35, 1.3]
    losses[40:46] = [2.2, 2.15, 2.3, 2.2, 2.15, 2.25]
    evals = {1: 1.85, 200: 1.3, 400: 1.15}
    assert not codes(diagnose_history(losses, evals))
    assert codes(diagnose_history(losses, {20: 1.85, 200: 1.3, 400: 1.15})) == {"LORA345": "warning"}


def test_a_flat_curve_is_flat_though_its_first_losses_were_low() -> None:
    losses = noisy([0.693] * 400, 0.09)
    losses[:3] = [0.52, 0.75, 0.5]
    assert codes(diagnose_history(losses)) == {"LORA344": "warning"}


def test_a_flat_loss_of_drawn_noise_is_told_as_an_info_unless_it_is_evaluated() -> None:
    drawn = noisy([0.4] * 2_000, 0.3)
    assert codes(diagnose_history(drawn)) == {"LORA344": "info"}
    assert codes(diagnose_history(drawn, [0.4, 0.401, 0.399])) == {"LORA344": "warning"}
    assert codes(diagnose_history(noisy([0.6] * 2_000, 0.3))) == {"LORA344": "warning"}
    assert codes(diagnose_history(noisy([0.4] * 2_000, 0.2))) == {"LORA344": "warning"}


TOKENS = {"vocabulary_size": 32_000, "total_steps": 100}  # a guess: 10.4


def test_a_language_model_that_was_destroyed_knows_how_often_tokens_come() -> None:
    gone = noisy([9.1 + 3.0 * 0.8**i for i in range(100)], 0.05)
    report = diagnose_history(gone, learning_rate=0.02, **TOKENS)
    assert codes(report) == {"LORA347": "warning"}
    assert "from 0.02 to 0.002" in report.findings[0].fix
    assert not codes(diagnose_history([loss - 1.1 for loss in gone], **TOKENS)), "below 80 % of a guess"
    lost = noisy([3.0 + 3.0 * 0.8**i for i in range(40)] + [9.1] * 60, 0.02)
    assert "LORA347" not in codes(diagnose_history(lost, **TOKENS)), "it knew more: that is a divergence"
    learns = noisy([8.0 + 4.0 * 0.985**i for i in range(100)], 0.05)
    assert not codes(diagnose_history(learns, **TOKENS)), "it falls on"


def test_no_mean_over_tokens_stays_above_a_guess() -> None:
    summed = noisy([26 + 8 * 0.9**i for i in range(100)], 0.02)
    report = diagnose_history(summed, **TOKENS)
    assert codes(report) == {"LORA347": "warning"}
    assert "micro-batches" in report.findings[0].fix
    assert not codes(diagnose_history(summed, total_steps=100)), "it may be any other loss"
    assert codes(diagnose_history(noisy([26.0] * 100, 0.02), **TOKENS)) == {"LORA344": "warning"}, "a plateau"
    assert not codes(diagnose_history(noisy([10 + 30 * 0.98**i for i in range(100)], 0.02), **TOKENS)), (
        "it falls on"
    )


def test_diverges() -> None:
    up = [0.5, 0.6, 1.4, 3.0, 5.2, 7.9, 8.3]
    assert codes(diagnose_history(up)) == {"LORA342": "error"}
    back = noisy([4 - 0.05 * i for i in range(50)] + [1.5 + 0.05 * i for i in range(50)], 0.05)
    report = diagnose_history(back, learning_rate=0.01)
    assert codes(report) == {"LORA342": "error"}
    assert "from 0.01 to 0.001" in report.errors[0].fix
    third = noisy([4 - 0.05 * i for i in range(50)] + [min(2.5, 1.5 + 0.05 * i) for i in range(50)], 0.03)
    assert codes(diagnose_history(third)) == {"LORA342": "warning"}


@pytest.mark.parametrize(
    "history",
    [
        [2.0, 2.3, 2.1],
        [2.0, 2.6, 2.2, 2.4],
        [0.01, 3.9, 3.8, 3.6, 3.5, 3.3],
        [0.002, 0.01, 0.02, 0.03, 0.03, 0.03, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02],
        [4.9, 4.2, 4.8, 4.1, 4.7, 4.0, 4.6, 3.9, 4.5, 3.8, 4.4, 3.7, 4.3, 3.6],
    ],
    ids=[
        "three points",
        "four points",
        "an easy first batch",
        "the base fits already",
        "two batches in turn",
    ],
)
def test_too_little_evidence_is_silence(history: list[float]) -> None:
    assert not diagnose_history(history, total_steps=len(history)).findings


def test_never_moves() -> None:
    assert codes(diagnose_history([4.85] * 5)) == {"LORA343": "warning"}
    for start in (0.6931, 0.5):  # DPO and KTO, warming up
        assert codes(diagnose_history([start] * 6)) == {"LORA343": "info"}
        assert codes(diagnose_history([start] * 10)) == {"LORA343": "warning"}
    assert codes(diagnose_history([4.85, 4.61, 4.9] * 4)) == {"LORA343": "warning"}
    assert not diagnose_history([4.85] * 4).findings
    assert not diagnose_history([0.0001] * 9).findings, "equal by rounding"
    assert not diagnose_history([4.85] * 9 + [4.84]).findings


def test_plateau_needs_a_share_of_the_run() -> None:
    flat = noisy([2.0] * 60, 0.03)
    assert codes(diagnose_history(flat, total_steps=300)) == {"LORA344": "warning"}
    assert codes(diagnose_history(flat, total_steps=500)) == {"LORA344": "info"}
    assert not diagnose_history(flat, total_steps=1000).findings
    assert codes(diagnose_history(flat)) == {"LORA344": "info"}
    assert codes(diagnose_history(flat, steps_per_loss=10)) == {"LORA344": "warning"}
    assert not diagnose_history(noisy([0.04] * 60, 0.03), total_steps=300).findings, "the base fits already"
    assert not diagnose_history(noisy([2.0] * 60, 0.3), total_steps=300).findings, "too noisy to tell"


def test_plateau_names_the_rank() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    report = diagnose_history(noisy([2.0] * 60, 0.03), total_steps=300, expect=Expect(config=config))
    assert report.warnings[0].fix == (
        "stop, load the base anew, double the rank from 8 to 16 and lora_alpha with it from 16 to 32 (the scaling is "
        "the same then, and the learning rate can stay), and start from step 0, which costs the 60 steps so far and "
        "all 300 anew, 20% more than planned, and twice the adapter and its optimizer states: never resume a "
        "checkpoint with another rank. If a higher rank changes nothing, raise the learning rate"
    )
    stable = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], use_rslora=True)
    flat = noisy([2.0] * 120, 0.03)
    (found,) = diagnose_history(flat, learning_rate=2e-4, expect=Expect(config=stable)).warnings
    assert (
        "double the rank from 8 to 16 with the lora_alpha of 16 and the learning rate of 0.0002 as they are"
        in found.fix
    )
    assert "which costs the 120 steps so far, and twice the adapter" in found.fix
    assert "double the rank and lora_alpha with it (the scaling" in diagnose_history(flat).warnings[0].fix


def test_oscillates() -> None:
    slow = [2.0 + math.sin(i / 3) for i in range(80)]
    assert "LORA345" in codes(diagnose_history(noisy(slow, 0.03)))
    rng = random.Random(0)
    fast = [2.0 * (1 + (-1) ** i * rng.uniform(0.2, 0.6)) for i in range(60)]
    assert codes(diagnose_history(fast, total_steps=10_000)) == {"LORA345": "warning"}
    blown = [*noisy(FALL[:20], 0.05), 9.0, 12.0, 11.0, 8.0, 7.0, 6.0, *noisy(FALL[20:], 0.05)]
    assert codes(diagnose_history(blown)) == {"LORA345": "warning"}
    spike = [*noisy(FALL[:30], 0.05), 12.0, *noisy(FALL[30:], 0.05)]
    assert not diagnose_history(spike).findings, "one bad batch"


def test_overfits() -> None:
    rising = [1.6, 1.3, 1.2, 1.3, 1.4, 1.5]
    assert codes(diagnose_history(noisy(FALL, 0.05), rising)) == {"LORA346": "warning"}
    assert not diagnose_history(noisy(FALL, 0.05), [1.6, 1.3, 1.2, 1.15, 1.13, 1.13]).findings
    assert not diagnose_history(noisy(FALL, 0.05), [1.2, 1.3]).findings
    assert codes(diagnose_history(noisy(FALL, 0.05), [1.0, 1.4, 1.8])) == {"LORA346": "info"}
    assert not diagnose_history(noisy(FALL, 0.05), [1.0, 1.05, 1.1]).findings
    by_step = {80 * (i + 1): loss for i, loss in enumerate(rising)}
    report = diagnose_history(noisy(FALL, 0.05), dict(reversed(by_step.items())), steps_per_loss=6)
    assert "was 1.2 at step 240" in report.warnings[0].observed
    per_epoch = [2.0, 1.1, 0.6, 0.3, 0.1]
    assert codes(diagnose_history(per_epoch, [1.5, 1.3, 1.4, 1.6, 1.9])) == {"LORA346": "warning"}


def test_losses_below_zero_are_judged_only_where_it_is_certain() -> None:
    policy = [math.sin(i) * 0.1 for i in range(60)]
    assert not diagnose_history(policy, total_steps=100).findings
    assert codes(diagnose_history([*policy, math.nan])) == {"LORA340": "error"}


def test_a_rise_in_noise_is_seen_by_rank() -> None:
    rise = noisy([3.6 + 0.011 * i for i in range(150)], 0.12)
    assert codes(diagnose_history(rise)) == {"LORA342": "error"}
    rising = [3.6 + 0.2 * i for i in range(10)]
    assert codes(diagnose_history(rise, rising)) == {"LORA342": "error"}, "and no plateau"
    slight = noisy([3.6 + 0.0025 * i for i in range(150)], 0.05)
    both = [3.6, 3.66, 3.7, 3.75, 3.8, 3.85, 3.9, 4.0]
    assert codes(diagnose_history(slight, both))["LORA342"] == "warning"
    assert "LORA342" not in codes(diagnose_history(slight)), "evaluations on top of it decide"
    assert "LORA342" not in codes(diagnose_history(slight, both[::-1]))


def test_a_blow_up_in_the_first_steps() -> None:
    shot_up = [5.5, 4.2, *noisy([13.0] * 100, 0.25)]
    assert codes(diagnose_history(shot_up))["LORA342"] == "error"
    climbs = [2.2, 5.2, 8.0, 7.4, 6.9, 5.1, *noisy([3.2 + 1.5 * 0.8**i for i in range(80)], 0.03)]
    report = diagnose_history(climbs)
    assert "LORA342" in codes(report)
    assert "shot up to" in str(report)
    easy_first = [1.2, *noisy([1.5 + 2.4 * 0.97**i for i in range(90)], 0.03)]
    assert not diagnose_history(easy_first).findings, "an easy first batch"


def test_other_data_are_no_divergence() -> None:
    first = noisy([1.6 + 0.6 * 0.96**i for i in range(120)], 0.08)
    then = noisy([2.1 + 2.4 * 0.97**i for i in range(140)], 0.08)
    assert set(codes(diagnose_history(first + then)).values()) <= {"info"}
    lower = noisy([1.1 + 2.8 * 0.97**i for i in range(140)], 0.08)
    old_records = [1.9, 1.7, 1.6, 2.6, 2.7, 2.8]
    assert "LORA346" not in codes(diagnose_history(first + lower, old_records))
    assert "LORA346" in codes(diagnose_history(noisy([4.0 * 0.99**i for i in range(260)], 0.05), old_records))
    climbing = [1.7 * 1.05**i for i in range(20)]
    assert "LORA342" in codes(diagnose_history(first + climbing + then)), "it climbed before the jump"
    back = noisy([1.6 + 2.8 * 0.8**i for i in range(140)], 0.08)
    assert codes(diagnose_history(first + back)) == {"LORA345": "warning"}, (
        "as low as before: the steps, not the data"
    )


def test_evaluations_that_swing() -> None:
    loud = noisy([0.5] * 200, 0.6, seed=2)
    loud = [abs(loss) + 0.05 for loss in loud]
    swinging = [0.3, 1.4, 0.8, 0.25, 0.7, 0.1, 0.7, 0.2]
    assert codes(diagnose_history(loud, swinging))["LORA345"] == "warning"
    assert "LORA345" not in codes(diagnose_history(loud, [0.5, 0.4, 0.42, 0.33, 0.4, 0.31, 0.35, 0.3]))
    assert "LORA345" not in codes(diagnose_history(noisy(FALL, 0.05), swinging)), "a few drawn records"


def scattered(level: float, spread: float, count: int = 150, seed: int = 3) -> list[float]:
    """Losses around a level, or a trend from it, whose logarithms are normal."""
    rng = random.Random(seed)
    return [level * math.exp(rng.gauss(0, spread)) for _ in range(count)]


def test_noise_that_no_batch_makes() -> None:
    high = [12.0, 11.5, *scattered(8.0, 0.5)]
    assert codes(diagnose_history(high, total_steps=5000)) == {"LORA345": "warning"}
    assert not diagnose_history(scattered(8.0, 0.1), total_steps=5000).findings
    falling = [loss * 0.99**i for i, loss in enumerate(high)]
    assert not diagnose_history(falling, total_steps=5000).findings, "it learns in all its noise"
    slowly = [14.0, 14.0, 14.0, *(loss * 0.996**i for i, loss in enumerate(scattered(9.0, 0.45)))]
    assert not diagnose_history(slowly, total_steps=5000).findings
    summed = [100 * loss for loss in high]
    assert not diagnose_history(summed, total_steps=5000).findings, "no mean over tokens"
    between = [12.0, 11.5, *scattered(7.0, 0.25)]
    assert not diagnose_history(between, total_steps=5000).findings
    known = diagnose_history(between, total_steps=5000, vocabulary_size=256)
    assert codes(known) == {"LORA345": "warning"}, "above the 5.5 of a guess"
    no_gain = [3.7, 3.7, 3.7, *scattered(4.4, 0.45)]
    assert codes(diagnose_history(no_gain, total_steps=5000)) == {"LORA345": "warning"}
    labels = [1.3, 1.3, 1.3, *scattered(1.4, 0.7)]
    assert not diagnose_history(labels, total_steps=5000).findings, "labels of a classifier, one a batch"


def test_an_excursion_in_noise_that_an_evaluation_confirms() -> None:
    rng = random.Random(2)
    trend = [3.7] * 5 + [3.7 + 4 * 0.9**i for i in range(100)]
    history = [loss + rng.uniform(-1.2, 1.2) for loss in trend]
    assert not diagnose_history(history).findings
    assert codes(diagnose_history(history, [6.5, 4.2, 3.9, 3.8])) == {"LORA345": "warning"}


def test_plateau_by_evaluation_losses() -> None:
    loud = noisy([2.2] * 100, 0.15)
    assert not diagnose_history(loud).findings, "too noisy to tell"
    report = diagnose_history(loud, [2.2, 2.2, 2.19, 2.19, 2.19])
    assert codes(report) == {"LORA344": "warning"}
    assert "moved by less than 2%" in report.warnings[0].observed
    assert not diagnose_history(loud, [2.3, 2.27, 2.24, 2.21, 2.19]).findings, "slow, and on its way"
    assert not diagnose_history(noisy(FALL, 0.15), [2.2, 2.2, 2.19, 2.19]).findings, (
        "learned before the first"
    )


def test_no_better_than_an_early_evaluation() -> None:
    collapsed = noisy([2.0 + 3.0 * 0.85**i for i in range(200)], 0.02)
    evals = [2.14, 1.93, 2.28, 2.11, 2.22, 2.11, 2.1, 2.14, 2.11, 2.07]
    report = diagnose_history(collapsed, evals)
    assert codes(report) == {"LORA344": "warning"}
    assert "never again as low" in report.warnings[0].observed
    assert not diagnose_history(collapsed, [*evals[:-1], 1.94]).findings, "as low again, once"
    assert not diagnose_history(collapsed, [*evals[:2], *[2.0] * 8]).findings, "nearly as low, always"
    assert not diagnose_history(collapsed, [2.14, 2.0, 2.01, 2.0, 1.99, 2.0, 2.01, 2.0, 1.99, 2.0]).findings


def test_what_the_schedule_did() -> None:
    flat = noisy([2.0] * 110, 0.03)
    rising = [1e-5 * (i + 1) for i in range(110)]
    assert codes(diagnose_history(flat, total_steps=600, learning_rate=[1e-3] * 110)) == {
        "LORA344": "warning"
    }
    assert codes(diagnose_history(flat, total_steps=600, learning_rate=rising)) == {"LORA344": "info"}
    assert codes(diagnose_history(flat, total_steps=150, learning_rate=rising)) == {"LORA344": "warning"}
    warming = [1e-6] * 60 + [1e-3] * 50
    assert codes(diagnose_history(flat)) == {"LORA344": "warning"}
    assert codes(diagnose_history(flat, learning_rate=warming)) == {"LORA344": "info"}
    assert not diagnose_history(flat, learning_rate=[1e-6] * 80 + [1e-3] * 30).findings
    bump = [*noisy(FALL[:20], 0.04), *noisy([4.6, 8.0, 7.2, 6.0, 4.4, 3.0], 0.02), *noisy(FALL[20:], 0.04)]
    rates = [1e-3 * (1 - i / 20) for i in range(20)] + [1e-3 * (1 - i / 66) for i in range(66)]
    assert codes(diagnose_history(bump, learning_rate=1e-3)) == {"LORA345": "warning"}
    assert not diagnose_history(bump, learning_rate=rates).findings, "the schedule starts anew there"
    cycles = [[1e-3 * (1 - i / 25) for i in range(25)] for _ in range(5)]
    bumps = [2.5, *noisy([1.0 + 1.2 * math.exp(-i / 5) for _ in cycles for i in range(25)], 0.02)]
    assert codes(diagnose_history(bumps))["LORA345"] == "warning"
    assert not diagnose_history(
        bumps, learning_rate=[1e-3, *(rate for one in cycles for rate in one)]
    ).findings
    facts = history_facts(bump, learning_rate=rates)
    assert facts.learning_rate == 1e-3
    assert facts.restarts == (20,)
    assert history_facts(flat, learning_rate=warming).restarts == (), "a warm-up is none"


@pytest.mark.parametrize("seed", range(3))
def test_a_classifier_on_shuffled_labels_settles_at_chance_and_on_its_own_does_not(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4000, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    shuffled = labels[torch.randperm(4000, generator=generator)]
    assert codes(diagnose_history(classified(inputs, shuffled, seed), vocabulary_size=4)) == {
        "LORA347": "warning"
    }
    assert not diagnose_history(classified(inputs, labels, seed), vocabulary_size=4).findings


def test_a_classifier_on_its_way_through_chance_is_left_alone() -> None:
    losses = noisy([1.9 - 0.0043 * i for i in range(120)], 0.03)
    assert not diagnose_history(losses, vocabulary_size=4).findings


def classified(inputs: torch.Tensor, labels: torch.Tensor, seed: int) -> list[float]:
    """Losses of a linear classifier that begins with wrong opinions, as a pretrained one does."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(16, 4)
    model.weight.data *= 8
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = []
    for first in range(0, 4000, 16):
        loss = torch.nn.functional.cross_entropy(
            model(inputs[first : first + 16]), labels[first : first + 16]
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        history.append(loss.item())
    return history


# ------------------------------------------------------------------ real runs


@pytest.mark.parametrize(
    "run",
    [run for run in json.loads(RUNS.read_text()) if run["kind"] in ("healthy", "overfitting")],
    ids=lambda run: f"{run['kind']}-{run['learning_rate']}-{run['batch_size']}",
)
def test_real_runs_are_judged_right(run: dict[str, Any]) -> None:
    evals = {int(step): loss for step, loss in run["evals"].items()} or None
    found = codes(diagnose_history(run["losses"], evals, total_steps=400))
    assert found == ({} if run["kind"] == "healthy" else {"LORA346": "warning"})


# ------------------------------------------------------------------ laws


@given(histories)
def test_appending_nan_always_fires(history: list[float]) -> None:
    assert codes(diagnose_history([*history, math.nan]))["LORA340"] == "error"


@given(st.lists(losses, min_size=1, max_size=80, unique=True), st.integers(1, 200))
def test_a_monotone_fall_never_fires(history: list[float], total: int) -> None:
    falling = sorted(history, reverse=True)
    report = diagnose_history(falling, sorted(history)[::-1][:6], total_steps=total)
    fell = falling[len(falling) // 2] < 0.8 * falling[0]
    assert set(codes(report)) <= (set() if fell else {"LORA344"})


@given(st.integers(-8, 8), st.integers(0, 10_000), st.sampled_from(["fall", "flat", "up", "swing", "over"]))
def test_scaling_by_a_power_of_two_changes_no_verdict(power: int, seed: int, kind: str) -> None:
    trends = {
        "fall": FALL,
        "flat": [2.0] * 80,
        "up": FALL[:40] + [FALL[40] * 1.06**i for i in range(40)],
        "swing": [2.0 + math.sin(i / 3) for i in range(80)],
        "over": FALL,
    }
    history = [loss * 256 for loss in noisy(trends[kind], 0.05, seed)]
    evals = [512.0, 400.0, 380.0, 440.0, 520.0] if kind == "over" else None
    factor = 2.0**power
    scaled = [loss * factor for loss in history]
    assert min(history + scaled) > FITS
    one = diagnose_history(history, evals, total_steps=400)
    other = diagnose_history(scaled, evals and [loss * factor for loss in evals], total_steps=400)
    assert codes(one) == codes(other)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_the_order_of_the_noise_does_not_matter(seed: int, rng: random.Random) -> None:
    shares = noisy([1.0] * 120, 0.08, seed)
    rng.shuffle(shares)
    fall = [3.0 * 0.98**i + 0.4 for i in range(120)]
    assert not diagnose_history([y * s for y, s in zip(fall, shares, strict=True)], total_steps=240).findings


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=70), st.none() | st.lists(losses, max_size=9))
def test_any_numbers_are_judged(history: list[float], evals: list[float] | None) -> None:
    report = diagnose_history(history, evals, total_steps=50)
    assert Report.from_json(report.to_json()) == report


@given(st.lists(losses, min_size=3, max_size=80), st.floats(-3, 3), st.floats(-2, 2))
def test_noise_ignores_a_straight_trend(history: list[float], slope: float, offset: float) -> None:
    tilted = [loss + slope * i + offset for i, loss in enumerate(history)]
    assert noise(tilted) == pytest.approx(noise(history), abs=1e-9)


def test_noise_and_levels_measure_what_they_say() -> None:
    rng = random.Random(1)
    history = [5 + rng.gauss(0, 0.2) for _ in range(4000)]
    assert noise(history) == pytest.approx(0.2, rel=0.1)
    known = levels(history)
    assert len(known) == 20
    assert known[-1].first + known[-1].count == len(history)
    z = [(one.value - 5) / one.error for one in known]
    assert 0.5 < math.sqrt(sum(x * x for x in z) / len(z)) < 1.6
    assert level([1.0, 2.0, 30.0], 0, 3).value == 2.0
    fall = clearest_fall([2.0] * 30 + [1.0] * 70)
    assert fall.size > 0.9
    assert swings([1, 3, 1, 3, 1, 3], height=1.5) == 2
    found = jump([*history[:60], *[9 - 0.02 * i + (i % 3) / 10 for i in range(60)]])
    assert found is not None
    assert found.at == 60
    assert found.trend < -5
    assert jump(history[:200]) is None
    assert jump([*history[:60], 40.0, *history[60:120]]) is None, "one loss alone"
    climb = [5 + 0.4 * i for i in range(20)]
    assert jump([*history[:60], *climb, *[16.0] * 40]) is None, "it climbed before"
    assert repetition([1.0, 2.0] * 5) == 2
    assert repetition([1.0, 2.0, 1.0, 2.0]) is None
    assert cycles(deviations([3.0, 2.0, 2.5] * 10))
    assert not cycles(deviations(history[:60]))


def test_the_rank_test_is_calibrated_and_blind_to_the_shape_of_noise() -> None:
    rng = random.Random(5)
    draws = [trend([rng.expovariate(1) ** 3 for _ in range(60)]) for _ in range(400)]
    assert abs(sum(draws) / len(draws)) < 0.2
    assert 0.85 < math.sqrt(sum(z * z for z in draws) / len(draws)) < 1.15
    rising = [rng.gauss(0, 1) + 0.02 * i for i in range(1000)]
    assert trend(rising) > 5
    assert trend([math.exp(value) for value in rising[:200]]) == trend(rising[:200])
    assert trend([-value for value in rising[:200]]) == -trend(rising[:200])
    assert trend([1.0] * 50) == trend([1.0, 2.0, 3.0]) == 0


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_losses": []}, ValueError, "train_losses must hold"),
        ({"train_losses": "2.0"}, TypeError, "train_losses must be a list"),
        ({"train_losses": 2.0}, TypeError, "train_losses must be a list"),
        ({"train_losses": {1: 2.0}}, TypeError, "train_losses must be a list"),
        ({"train_losses": {2.0, 1.0}}, TypeError, "train_losses must be a list"),
        ({"train_losses": ["2.0"]}, TypeError, r"train_losses\[0\] must be a number"),
        ({"train_losses": [2.0, [1.0]]}, TypeError, r"train_losses\[1\] must be a number"),
        ({"train_losses": [2.0, None]}, TypeError, r"train_losses\[1\] must be a number"),
        ({"train_losses": [True]}, TypeError, r"train_losses\[0\] must be a number"),
        ({"train_losses": numpy.ones((2, 2))}, TypeError, r"train_losses\[0\] must be one number"),
        ({"train_losses": [10**400]}, TypeError, r"train_losses\[0\] must be one number"),
        ({"train_losses": [1.0], "eval_losses": "1.0"}, TypeError, "eval_losses must be a list"),
        ({"train_losses": [1.0], "eval_losses": {"a": 1.0}}, TypeError, "eval_losses must be a whole number"),
        ({"train_losses": [1.0], "eval_losses": {-1: 1.0}}, ValueError, "eval_losses must be at least 0"),
        ({"train_losses": [1.0], "total_steps": 0}, ValueError, "total_steps must be at least 1"),
        ({"train_losses": [1.0], "total_steps": 1.5}, TypeError, "total_steps must be a whole number"),
        ({"train_losses": [1.0], "steps_per_loss": True}, TypeError, "steps_per_loss must be a whole number"),
        ({"train_losses": [1.0], "learning_rate": -1}, ValueError, "learning_rate must be a finite number"),
        ({"train_losses": [1.0], "learning_rate": "1e-4"}, TypeError, "learning_rate must be a number"),
        (
            {"train_losses": [1.0], "learning_rate": [1e-4, 1e-4]},
            ValueError,
            "one rate for each of 1 training",
        ),
        (
            {"train_losses": [1.0], "learning_rate": ["1e-4"]},
            TypeError,
            r"learning_rate\[0\] must be a number",
        ),
        ({"train_losses": [1.0], "learning_rate": {1: 1e-4}}, TypeError, "learning_rate must be a list"),
        ({"train_losses": [1.0], "vocabulary_size": 1}, ValueError, "vocabulary_size must be at least 2"),
        ({"train_losses": [1.0], "expect": {}}, TypeError, "expect must be an Expect"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnose_history(**arguments)


def test_numbers_of_other_libraries_are_numbers() -> None:
    for history in (
        numpy.array([2.0, 1.5]),
        torch.tensor([2.0, 1.5]),
        [torch.tensor([2.0]), numpy.float32(1.5)],
    ):
        assert history_facts(history).train == (2.0, 1.5)
    assert history_facts(loss for loss in (2.0, 1.5)).train == (2.0, 1.5)
    assert history_facts([2.0, 1.5], learning_rate=torch.tensor(0.5)).rates == ()
    assert history_facts([2.0, 1.5], learning_rate=numpy.array([0.5, 0.25])).rates == (0.5, 0.25)
