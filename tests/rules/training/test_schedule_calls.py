"""The code that makes a schedule anew, which a fix prints, makes the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    StepLR,
)

from pytest_lora.inspection.training.optimizer import schedule_facts


class OwnSchedule(StepLR):
    """A user's own class has no place in torch."""


def an_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)


@pytest.mark.parametrize(
    ("made", "settings", "has_call"),
    [
        (StepLR, {"step_size": 3, "gamma": 0.25}, True),
        (CosineAnnealingLR, {"T_max": 7}, True),
        (CosineAnnealingWarmRestarts, {"T_0": 3, "T_mult": 2}, True),
        (LinearLR, {"total_iters": 4}, True),
        (LambdaLR, {"lr_lambda": lambda step: 1 / (1 + step)}, False),
        (MultiStepLR, {"milestones": [2, 4]}, False),
        (OneCycleLR, {"max_lr": 1.0, "total_steps": 9}, False),
        (OwnSchedule, {"step_size": 3}, False),
    ],
)
def test_a_schedule_is_made_again(made: Any, settings: dict[str, Any], has_call: bool) -> None:
    scheduler = made(an_optimizer(), **settings)
    call = schedule_facts(scheduler, an_optimizer()).call
    assert (call is not None) is has_call
    if call is not None:
        again = eval(call, {"torch": torch, "optimizer": an_optimizer()})
        assert type(again) is made
        assert rates(again) == rates(scheduler)


def rates(scheduler: Any) -> list[float]:
    found = []
    for _ in range(10):
        scheduler.optimizer.step()
        scheduler.step()
        found += scheduler.get_last_lr()
    return found
