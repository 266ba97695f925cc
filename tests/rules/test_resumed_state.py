"""State of optimizers and schedules against the adapter that they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pytest_lora import Finding, Report, check_model, check_training
from pytest_lora.bases.examples.models import BASES, language_batch

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(**changes: Any) -> Any:
    fields = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(BASES["base"](), LoraConfig(**fields)).train()


def adam(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-3, **changes})


def trained(
    steps: int, *, lr: float = 1e-3, **changes: Any
) -> tuple[Any, torch.optim.Optimizer, CosineAnnealingLR]:
    model = adapted(**changes)
    optimizer = adam(model, lr=lr)
    schedule = CosineAnnealingLR(optimizer, 1000)
    for _ in range(steps):
        model(**language_batch()).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule


def said(code: str, report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == code]


def test_moments_of_an_adapter_that_was_not_loaded_are_told() -> None:
    _, saved, _ = trained(5)
    model = adapted()
    optimizer = adam(model)
    optimizer.load_state_dict(saved.state_dict())
    (finding,) = said("LORA364", check_model(model, optimizer=optimizer))
    assert "4 factors are all zero, and AdamW has counted 5 steps" in finding.observed
    assert finding.severity == "warning"
    assert said("LORA364", check_training(model, language_batch(), optimizer=optimizer))


def test_remedies_of_foreign_moments() -> None:
    before, saved, _ = trained(5)
    model = adapted()
    optimizer = adam(model)
    optimizer.load_state_dict(saved.state_dict())
    assert said("LORA364", check_model(model, optimizer=optimizer))
    model.load_state_dict(before.state_dict())
    assert not check_model(model, optimizer=optimizer).findings
    assert not check_model(adapted(), optimizer=adam(adapted())).warnings


def test_moments_of_another_rank_are_an_error_before_any_step_raises() -> None:
    _, saved, _ = trained(2, r=4)
    model = adapted(r=8)
    optimizer = adam(model)
    optimizer.load_state_dict(saved.state_dict())
    (finding,) = said("LORA364", check_model(model, optimizer=optimizer))
    assert finding.severity == "error"
    assert "(4, 64) for (8, 64)" in finding.observed


@pytest.mark.parametrize(
    ("steps", "lr"), [(0, 1e-3), (1, 0.0), (5, 1e-3)], ids=["fresh", "warm-up", "running"]
)
def test_an_optimizer_of_its_own_adapter_is_left_alone(steps: int, lr: float) -> None:
    model, optimizer, _ = trained(steps, lr=lr)
    assert not said("LORA364", check_model(model, optimizer=optimizer))


def test_a_schedule_that_was_resumed_alone_is_told() -> None:
    _, _, saved = trained(12)
    model = adapted()
    optimizer = adam(model)
    schedule = CosineAnnealingLR(optimizer, 1000)
    schedule.load_state_dict(saved.state_dict())
    report = check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)
    (finding,) = said("LORA365", report)
    assert "has counted 12 steps, the optimizer none" in finding.observed


def test_remedy_of_a_schedule_that_was_resumed_alone() -> None:
    before, state, saved = trained(12)
    optimizer = adam(before)
    optimizer.load_state_dict(state.state_dict())
    schedule = CosineAnnealingLR(optimizer, 1000)
    schedule.load_state_dict(saved.state_dict())
    report = check_training(before, language_batch(), optimizer=optimizer, scheduler=schedule)
    assert not said("LORA365", report)


@pytest.mark.parametrize("steps", [0, 3, 12])
def test_a_schedule_beside_its_own_optimizer_is_left_alone(steps: int) -> None:
    model, optimizer, schedule = trained(steps)
    report = check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)
    assert not said("LORA365", report)


def test_an_optimizer_without_counters_is_left_alone() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = CosineAnnealingLR(optimizer, 1000, last_epoch=-1)
    for _ in range(20):
        schedule.step()
    report = check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)
    assert not said("LORA365", report)


def adaptive(steps: int, *, allocates: bool, **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    """AdaLoRA after some steps; its ranks are to be taken away from the second step on."""
    fields = {"init_r": 4, "target_r": 1, "total_step": 12, "tinit": 1, "tfinal": 4, "deltaT": 1, **changes}
    model = get_peft_model(
        BASES["base"](), AdaLoraConfig(target_modules=["q_proj", "v_proj"], **fields)
    ).train()
    optimizer = adam(model, lr=1e-2)
    for step in range(steps):
        model(**language_batch()).loss.backward()
        optimizer.step()
        if allocates:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model, optimizer


def test_ranks_that_nothing_allocates_are_told() -> None:
    model, optimizer = adaptive(4, allocates=False)
    (finding,) = said("LORA348", check_model(model, optimizer=optimizer))
    assert (finding.severity, "counted 4 steps" in finding.observed) == ("warning", True)
    assert "from step 2 on" in finding.observed


def test_ranks_that_are_allocated_or_not_yet_due_are_fine() -> None:
    model, optimizer = adaptive(11, allocates=True)
    pruned = [bool((p == 0).all()) for n, p in model.named_parameters() if "lora_E" in n]
    assert any(pruned), "a module lost all of its ranks, and its moments go on"
    report = check_model(model, optimizer=optimizer)
    assert not said("LORA348", report)
    assert not said("LORA364", report)
    early, optimizer = adaptive(2, allocates=False)
    assert not said("LORA348", check_model(early, optimizer=optimizer))
    resumed, optimizer = adaptive(4, allocates=False)
    resumed.peft_config["default"].rank_pattern = {"q_proj": [True, False, True, False]}
    assert not said("LORA348", check_model(resumed, optimizer=optimizer)), "chosen before it was saved"
