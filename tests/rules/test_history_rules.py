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
    level,
    levels,
    noise,
    repetition,
    swings,
)
from pytest_lora.facts.history import FITS, history_facts

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
    assert "from 8 to 16" in report.warnings[0].fix
    assert "from 16 to 32" in report.warnings[0].fix
    assert "epoch 0" in report.warnings[0].fix


def test_oscillates() -> None:
    slow = [2.0 + math.sin(i / 3) for i in range(80)]
    assert "LORA345" in codes(diagnose_history(noisy(slow, 0.03)))
    rng = random.Random(0)
    fast = [2.0 * (1 + (-1) ** i * rng.uniform(0.2, 0.6)) for i in range(60)]
    assert codes(diagnose_history(fast, total_steps=10_000)) == {"LORA345": "warning"}
    blown = [*noisy(FALL[:30], 0.05), 9.0, 12.0, 11.0, 8.0, 7.0, 6.0, *noisy(FALL[30:], 0.05)]
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
    assert repetition([1.0, 2.0] * 5) == 2
    assert repetition([1.0, 2.0, 1.0, 2.0]) is None
    assert cycles(deviations([3.0, 2.0, 2.5] * 10))
    assert not cycles(deviations(history[:60]))


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
