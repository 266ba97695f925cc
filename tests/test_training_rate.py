"""The learning rate of a trial: by the formula, and within its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora.inspection.model import model_facts
from pytest_lora.inspection.training.optimizer import suitable_rate


def rate(modules: int, rank: int = 8, alpha: float = 16) -> float:
    """The rate for adapters on so many linear layers."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(4, 4) for _ in range(modules)))
    config: Any = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[str(i) for i in range(modules)])
    return suitable_rate(model_facts(get_peft_model(base, config)).active_layers)


def test_ten_modules_of_rank_8_and_scaling_2_get_the_rate_that_was_measured() -> None:
    assert rate(10) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("modules", "rank", "alpha", "expected"),
    [
        (20, 8, 16, 5e-3),  # the changes of all modules add up
        (40, 8, 16, 2.5e-3),
        (10, 8, 64, 2.5e-3),  # four times the scaling
        (10, 32, 64, 5e-3),  # four times the rank: twice the change
        (10, 2, 4, 1e-2),  # less would allow more, but not beyond what was measured
        (1, 8, 16, 1e-2),
    ],
)
def test_the_formula(modules: int, rank: int, alpha: float, expected: float) -> None:
    assert rate(modules, rank, alpha) == pytest.approx(expected)


def test_the_lowest_rate() -> None:
    """A hundredth of what was measured, also where the formula asks for far less."""
    assert rate(10, 8, 16 * 99) == pytest.approx(1e-2 / 99)
    assert rate(10, 8, 16 * 101) == pytest.approx(1e-4)
    assert rate(10, 8, 16e9) == pytest.approx(1e-4)


def test_weak_adapters_get_up_to_three_times_as_much() -> None:
    """Weak: a scaling times the root of the rank below 1."""
    strength = 0.5
    assert rate(10, 4, 4 * strength / 2) == pytest.approx(3e-2)
    assert rate(100, 4, 4 * strength / 2) == pytest.approx(1e-2 * 2 * math.sqrt(8) / strength / 10)


def test_without_an_adapter_that_acts_it_is_that_which_was_measured() -> None:
    assert suitable_rate(()) == pytest.approx(1e-2)
    assert rate(2, 8, 0) == pytest.approx(1e-2)
