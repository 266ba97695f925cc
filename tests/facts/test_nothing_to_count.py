"""What is said where there is nothing to count, or nothing of one kind: a share of nothing is 0, and nothing raises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pytest_lora.facts.behaviour import ParameterShareFacts
from pytest_lora.facts.figures.adapter_maps import model_maps
from pytest_lora.facts.history import history_facts
from pytest_lora.facts.memory_choices import MEASURED_ON, Parallel
from pytest_lora.facts.model_parts import Wrappers
from pytest_lora.facts.steps import StepFacts
from pytest_lora.facts.training import TrainingFacts, fell
from tests.facts.test_adapter_maps import sound

__all__ = ["sound"]


def test_shares_of_nothing() -> None:
    facts = ParameterShareFacts("Model", trainable=0, adapter=0, total=0, stored=0, low=0.0, high=1.0)
    assert (facts.percent, facts.stored_percent, facts.packed) == (0.0, 0.0, False)
    packed = replace(facts, trainable=3, total=60, stored=30)
    assert (packed.percent, packed.stored_percent, packed.packed) == (5.0, 10.0, True)


def test_a_map_of_tensors_of_which_this_process_has_no_numbers(sound: TrainingFacts) -> None:
    (usual,) = model_maps(sound.model)
    assert replace(usual, trainable_parameters=0, total_parameters=0).percent == 0.0
    elsewhere = tuple(replace(t, numbers=0, gradients=(None,)) for t in sound.tensors)
    (found,) = model_maps(sound.model, replace(sound, tensors=elsewhere))
    assert {value for value in found.gradients if value is not None} == {0.0}
    assert {value for value in found.updates if value is not None} == {0.0}


@pytest.mark.parametrize(
    ("loss", "norm", "finite"),
    [
        (1.0, 2.0, True),
        (1.0, None, True),
        (math.nan, None, False),
        (math.inf, 2.0, False),
        (1.0, math.inf, False),
        (1.0, math.nan, False),
    ],
)
def test_a_step_without_gradients_is_finite_by_its_loss(
    sound: TrainingFacts, loss: float, norm: float | None, finite: bool
) -> None:
    step = StepFacts(batch=0, loss=loss, has_graph=True, rates=(0.1,), gradient_norm=norm)
    assert step.finite is finite
    assert replace(sound, steps=(*sound.steps, step)).finite is finite


def test_a_curve_fell_by_a_hundredth_of_its_first_quarter() -> None:
    assert [fell([1.0, 1.0, 1.0, 1.0 - by]) for by in (0.0, 0.009, 0.011)] == [False, False, True]
    assert not fell([-1.0, -1.0, -1.0, -1.009])
    assert fell([-1.0, -1.0, -1.0, -1.011])
    assert fell([math.inf, 1.0, 0.5])
    assert not fell([1.0])
    assert fell([1.0, 0.5])


def test_losses_are_of_one_step_each_where_nothing_is_said() -> None:
    facts = history_facts([3.0, 2.0, 1.0])
    assert (facts.steps_per_loss, facts.step(2)) == (
        1,
        history_facts([3.0, 2.0, 1.0], steps_per_loss=1).step(2),
    )


def test_what_was_measured_with_a_strategy() -> None:
    for strategy, most in MEASURED_ON.items():
        assert Parallel(most, strategy).unmeasured == ""
        assert f" on more than {most} GPUs" in Parallel(most + 1, strategy).unmeasured
    assert "tp" not in MEASURED_ON
    assert "no measured step with tp was compared" in Parallel(2, "tp").unmeasured


def test_nothing_is_divided_where_nothing_wraps() -> None:
    assert (Wrappers().ranks, Wrappers().unseen) == (1, 0)
