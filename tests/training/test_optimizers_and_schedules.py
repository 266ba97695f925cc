"""What an optimizer holds and what a schedule will do: facts on a handful of numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, StepLR

from pytest_lora.facts.optimizer import Misshapen, Missing, ScheduleFacts
from pytest_lora.inspection.training.optimizer import (
    HORIZON,
    as_float,
    default_optimizer,
    optimizer_facts,
    param_groups,
    part_of,
    schedule_facts,
)
from tests.rules.training.setups import adapted, trainable


def sgd(lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def schedule(function: Any, lr: float = 0.5) -> ScheduleFacts:
    optimizer = sgd(lr)
    return schedule_facts(LambdaLR(optimizer, function), optimizer)


@pytest.mark.parametrize(
    ("function", "peak", "not_before", "ends"),
    [
        (lambda step: 1.0, 0.5, None, None),
        (lambda step: min(1.0, step / 10), 0.5, 9, None),
        (lambda step: min(1.0, (step + 1) / 2), 0.5, 0, None),
        (lambda step: max(0.0, 1 - step / 20), 0.5, None, 20),
        (lambda step: 1.0 if step < 1_000_000 else 0.0, 0.5, None, 2**20),
        (lambda step: 1.0 if 64 < step < 512 else 0.0, 0.5, 64, 512),
        (lambda step: 0.0, 0.0, None, 0),
        (lambda step: float(step), 0.5 * 2**20, 2**19, None),
        (lambda step: float(step) if step < 2**20 else 0.0, 0.5 * 2**19, 2**18, 2**20),
        (lambda step: 1 / step, None, None, None),
        (lambda step: [1.0][step], None, None, None),
        (lambda step: [0.0][step], None, None, None),
        (lambda step: [0.1, 1.0][step], 0.5, 0, None),
        (lambda step: step.without_such if step else 1e-3, None, None, None),
        (lambda step: None, None, None, None),
    ],
)
def test_a_function_of_the_step_is_looked_at_beforehand(
    function: Any, peak: float | None, not_before: int | None, ends: int | None
) -> None:
    try:
        found = schedule(function)
    except Exception:  # LambdaLR asks for step 0 itself
        made = SimpleNamespace(lr_lambdas=[function], base_lrs=[0.5])
        found = schedule_facts(type("LambdaLR", (), vars(made))(), None)
    assert (found.peak, found.not_before, found.ends) == (peak, not_before, ends)


def test_how_far_a_schedule_is_looked_at() -> None:
    assert HORIZON[:3] == (0, 1, 2)
    assert HORIZON[64:67] == (64, 128, 256)
    assert HORIZON[-1] == 1_048_576
    assert len(HORIZON) == 79


def test_the_largest_rate_of_all_groups_counts() -> None:
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 2.0}])
    found = schedule_facts(LambdaLR(optimizer, [lambda step: 3.0, lambda step: 1.0]), optimizer)
    assert found.peak == 2.0
    assert schedule_facts(LambdaLR(optimizer, [lambda step: 5.0, lambda step: 1.0]), optimizer).peak == 2.5


def test_a_schedule_that_multiplies_is_no_function_of_the_step() -> None:
    optimizer = sgd()
    made = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.5)
    assert schedule_facts(made, optimizer).peak is None


def test_what_a_schedule_was_made_for() -> None:
    optimizer = sgd()

    def partial(**keywords: Any) -> Any:
        return SimpleNamespace(lr_lambdas=[SimpleNamespace(keywords=keywords)], base_lrs=[1.0])

    found = schedule_facts(partial(num_warmup_steps=3, num_training_steps=40.0), None)
    assert (found.warm_up, found.planned, found.schedule) == (3, 40, "SimpleNamespace")
    unknown = schedule_facts(partial(num_warmup_steps="3"), None)
    assert (unknown.warm_up, unknown.planned) == (None, None)
    plain = schedule_facts(SimpleNamespace(last_epoch=7), None)
    assert (plain.steps_taken, plain.peak, plain.warm_up) == (7, None, None)
    assert schedule_facts(SimpleNamespace(), None).steps_taken == 0
    wrapped = schedule_facts(SimpleNamespace(scheduler=LambdaLR(optimizer, lambda step: 1.0)), optimizer)
    assert (wrapped.schedule, wrapped.drives) == ("LambdaLR", True)


def test_whether_a_schedule_drives_the_optimizer() -> None:
    mine, other = sgd(), sgd()
    made = LambdaLR(mine, lambda step: 1.0)
    assert schedule_facts(made, mine).drives
    assert not schedule_facts(made, other).drives
    groups = SimpleNamespace(param_groups=mine.param_groups)
    assert schedule_facts(made, groups).drives
    # It cannot be told.
    assert schedule_facts(SimpleNamespace(optimizer=None), mine).drives
    assert schedule_facts(made, SimpleNamespace(param_groups=None)).drives
    assert schedule_facts(SimpleNamespace(optimizer=SimpleNamespace(param_groups=[])), mine).drives
    assert schedule_facts(made, SimpleNamespace(param_groups=[])).drives


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda o: StepLR(o, 3), "torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)"),
        (
            lambda o: CosineAnnealingLR(o, 9),
            "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.0)",
        ),
        (lambda o: MultiStepLR(o, [3]), None),
        (lambda o: LambdaLR(o, lambda step: 1.0), None),
        (lambda o: SimpleNamespace(), None),
    ],
)
def test_the_call_that_makes_a_schedule_of_torch(make: Any, call: str | None) -> None:
    optimizer = sgd()
    assert schedule_facts(make(optimizer), optimizer).call == call


def test_numbers_of_groups() -> None:
    assert math.isnan(as_float(None))
    assert as_float(torch.tensor(0.5)) == 0.5
    model = adapted()
    (a, *_) = trainable(model, "lora_A")
    with_all = torch.optim.SGD([{"params": [a], "initial_lr": 3.0}], lr=0.5, weight_decay=0.1)
    (group,) = optimizer_facts(model, with_all).groups
    assert (group.index, group.lr, group.initial_lr, group.weight_decay, group.eps) == (
        0,
        0.5,
        3.0,
        0.1,
        None,
    )
    assert (group.parts, group.dtypes) == (("a",), ("float32",))
    (adam,) = optimizer_facts(model, torch.optim.Adam([a], lr=0.5, eps=1e-3)).groups
    assert (adam.eps, adam.initial_lr) == (1e-3, None)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, not object"):
        param_groups(object())
    assert part_of("a.bias", nn.Parameter(torch.zeros(1)), {}) == "bias"
    assert part_of("a.bias", torch.zeros(1), {}) == "base"
    assert part_of("a.weight", nn.Parameter(torch.zeros(1)), {}) == "base"
    assert default_optimizer(nn.Linear(1, 1).requires_grad_(False), 0.1) is None
    made = default_optimizer(model, 0.25)
    assert made is not None
    assert made.param_groups[0]["lr"] == 0.25


def test_what_an_optimizer_holds() -> None:
    model = adapted()
    first, *others = trainable(model)
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    stranger, other_stranger = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([first, frozen, stranger, other_stranger], lr=0.1)
    with pytest.warns(UserWarning, match="duplicate"):
        doubled = torch.optim.SGD([*others, others[0]], lr=0.1)
    found = optimizer_facts(model, optimizer)
    assert (found.optimizer, found.held, found.frozen, found.foreign) == ("SGD", (names[0],), 1, 2)
    assert [one.name for one in found.missing] == names[1:]
    assert found.missing[0] == Missing(names[1], "b")
    assert found.doubled == ()
    assert (found.groups[0].parts, found.groups[0].dtypes) == (("a",), ("float32",))
    twice = optimizer_facts(model, doubled)
    assert twice.doubled == (names[1],)
    assert (twice.frozen, twice.foreign, len(twice.missing)) == (0, 0, 1)
    wrapper = SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups)
    assert optimizer_facts(model, wrapper).optimizer == "SGD"


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}]
)
def test_an_inactive_adapter_is_not_missing(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "other" in name:
            parameter.requires_grad_(True)
    mine = [p for n, p in model.named_parameters() if p.requires_grad and "other" not in n]
    found = optimizer_facts(model, torch.optim.SGD(mine, lr=0.1))
    assert found.missing == ()
    assert set(found.groups[0].parts) >= {"a", "b"}
    assert len(optimizer_facts(model, sgd()).missing) == len(mine)


@pytest.mark.parametrize(
    ("state", "steps", "misshapen", "unmoved"),
    [
        ({}, 0, False, False),
        ({"step": torch.tensor(5.0)}, 5, False, False),
        ({"step": 5, "exp_avg": "ones"}, 5, False, True),
        ({"step": 2, "exp_avg": "ones"}, 2, False, True),
        ({"step": 1, "exp_avg": "ones"}, 1, False, False),
        ({"exp_avg": "ones"}, 0, False, False),
        ({"step": 5, "exp_avg": "zeros"}, 5, False, False),
        ({"step": 5, "exp_avg": torch.ones(3)}, 5, True, True),
        # GaLore and APOLLO keep averages of the projected gradient, and the projector beside them.
        ({"step": 5, "exp_avg": torch.ones(3), "projector": object()}, 5, False, True),
        ({"step": 5, "exp_avg": torch.ones(3, dtype=torch.uint8)}, 5, False, False),
        ({"step": 5, "exp_avg": 1.0}, 5, False, False),
    ],
)
def test_what_the_state_says(state: dict[str, Any], steps: int, misshapen: bool, unmoved: bool) -> None:
    model = adapted()
    (name, factor) = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    optimizer = torch.optim.Adam([factor], lr=0.1)
    like = {"ones": torch.ones_like(factor), "zeros": torch.zeros_like(factor)}
    optimizer.state[factor] = {
        key: like.get(value, value) if isinstance(value, str) else value for key, value in state.items()
    }
    found = optimizer_facts(model, optimizer)
    assert (found.steps, bool(found.misshapen), bool(found.unmoved)) == (steps, misshapen, unmoved)
    if misshapen:
        assert found.misshapen == (Misshapen(name, tuple(factor.shape), (3,)),)
    # A factor that is not zero has moved.
    with torch.no_grad():
        factor.fill_(1.0)
    assert optimizer_facts(model, optimizer).unmoved == ()


def test_only_factors_are_said_not_to_have_moved() -> None:
    model = adapted(modules_to_save=["lm_head"])
    copied = next(p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n)
    with torch.no_grad():
        copied.zero_()
    optimizer = torch.optim.Adam([copied], lr=0.1)
    optimizer.state[copied] = {"step": 5, "exp_avg": torch.ones_like(copied)}
    assert optimizer_facts(model, optimizer).unmoved == ()
    plain = SimpleNamespace(param_groups=optimizer.param_groups, state=[copied])
    assert optimizer_facts(model, plain).steps == 0
