"""LoraHealthCallback on models that it was not made for: the training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, get_peft_model
from transformers import TrainerCallback

from pytest_lora import LoraHealthCallback, LoraHealthWarning
from pytest_lora.rules.training.ranks_are_never_allocated import CALLBACK
from tests.runs.test_watch import small, trainer


def whole() -> Any:
    return small()


def another_method() -> Any:
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(small(), config)


@pytest.mark.parametrize("make", [whole, another_method])
def test_a_model_without_lora_is_told_once_and_trains_to_its_end(make: Any, tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="raise")
    run = trainer(tmp_path, callback, make(), max_steps=3)
    with pytest.warns(LoraHealthWarning, match="carries no LoRA layers") as told:
        run.train()
    assert len([w for w in told if issubclass(w.category, LoraHealthWarning)]) == 1
    assert run.state.global_step == 3
    assert not callback.watch.reports


def allocates() -> TrainerCallback:
    """The callback that the fix of LORA348 spells out."""
    names: dict[str, Any] = {"TrainerCallback": TrainerCallback}
    exec(CALLBACK, names)
    made: TrainerCallback = names["AllocateRanks"]()
    return made


@pytest.mark.parametrize(
    ("callbacks", "told"), [([allocates], set()), ([], {"LORA348"})], ids=["called", "not"]
)
def test_adalora_trains_in_silence_where_its_allocator_is_called(
    tmp_path: Path, callbacks: list[Callable[[], TrainerCallback]], told: set[str]
) -> None:
    callback = LoraHealthCallback(on_error="raise")
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=12, target_modules=["q_proj"], total_step=12, task_type="CAUSAL_LM"
    )
    run = trainer(tmp_path, callback, get_peft_model(small(), config), max_steps=4)
    for one in callbacks:
        run.add_callback(one())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraHealthWarning)
        run.train()
    assert callback.watch.count == 4
    found = [f for report in callback.watch.reports for f in (*report.errors, *report.warnings)]
    assert {f.code for f in found} == told
    assert all(CALLBACK in f.fix for f in found)
    allocator: Any = run.model
    assert bool(allocator.base_model.rankallocator.ipt) == bool(callbacks), "whether the ranks were weighed"
