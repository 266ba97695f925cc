"""Learning rates, schedules, weight decay and what the optimizer holds: faults named, healthy trainings left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    Adafactor,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from pytest_lora import Report, check_training
from pytest_lora.bases.examples.models import (
    BASES,
    language_batch,
)
from tests.rules.training.setups import (
    FLAT,
    Build,
    adam,
    adapted,
    leave_alone,
    name_the_fault,
    trainable,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def sgd_with_the_rate_of_adam() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=torch.optim.SGD(trainable(model), lr=1e-6))


def adam_with_the_rate_of_nothing() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 1e-6), history=[4.9] * 8)


def rate_of_one() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 1.0))


def sgd_that_diverges() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=torch.optim.SGD(trainable(model), lr=1e5))


def schedule_that_ended_early() -> Report:
    model = adapted()
    optimizer = adam(model)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 4))
    for _ in range(20):
        scheduler.step()
    flat = [4.9] * 20
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler, history=flat)


def no_rate_for_b() -> Report:
    model = adapted()
    groups = [{"params": trainable(model, "lora_A")}, {"params": trainable(model, "lora_B"), "lr": 0.0}]
    return check_training(model, language_batch(), optimizer=torch.optim.AdamW(groups, lr=1e-3))


def next_to_no_rate_for_b() -> Report:
    model = adapted()
    groups = [{"params": trainable(model, "lora_A")}, {"params": trainable(model, "lora_B"), "lr": 1e-9}]
    return check_training(model, language_batch(), optimizer=torch.optim.AdamW(groups, lr=1e-3))


def schedule_that_takes_nearly_all() -> Report:
    model = adapted()
    optimizer = adam(model, 1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 1e-6)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler)


def constant_rate_of_zero() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 0.0))


def clipped_to_next_to_nothing() -> Report:
    return check_training(adapted(), language_batch(), max_grad_norm=1e-9)


def decay_of_a_hundred() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, weight_decay=100.0))


def misses_the_magnitudes() -> Report:
    model = adapted(use_dora=True)
    optimizer = torch.optim.AdamW(trainable(model, "lora_A", "lora_B"), lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def misses_the_token_rows() -> Report:
    model = adapted(trainable_token_indices=[3, 4])
    optimizer = torch.optim.AdamW(trainable(model, "lora_"), lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def misses_some_layers() -> Report:
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model, "layers.0."), lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def made_before_the_adapter() -> Report:
    base = BASES["base"]()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    return check_training(adapted(base), language_batch(), optimizer=optimizer)


def decayed_within_a_few_steps() -> Report:
    model = adapted()
    optimizer = adam(model, lr=2e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def warm_up_of_ten_thousand_steps() -> Report:
    model = adapted()
    optimizer = adam(model, lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10_000))
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def eps_of_one() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, lr=1e-4, eps=1.0), history=FLAT)


def sgd_that_is_slow_and_flat() -> Report:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=2e-4)
    return check_training(model, language_batch(), optimizer=optimizer, history=FLAT)


def scheduler_stepped_once_an_epoch() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 100)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def forgot_the_language() -> Report:
    model = adapted()
    history = [0.4, 5.2, 4.9, 4.7, 4.6]
    return check_training(model, language_batch(), optimizer=adam(model, lr=5e-2), history=history)


def exploded_so_far() -> Report:
    history = [2.1, 2.0, 2.3, 3.5, 6.1, 9.8]
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model), history=history)


def lost_in_the_rounding_of_bfloat16() -> Report:
    model = adapted().bfloat16()
    with torch.no_grad():
        for parameter in trainable(model, "lora_B"):
            parameter.fill_(0.1)
    return check_training(model, language_batch(), optimizer=adam(model, lr=1e-5))


def optimizer_of_another_rank() -> Report:
    model = adapted(r=4)
    saved = adam(model)
    model(**language_batch()).loss.backward()
    saved.step()
    model = adapted(r=8)
    optimizer = adam(model)
    optimizer.load_state_dict(saved.state_dict())
    return check_training(model, language_batch(), optimizer=optimizer)


FAULTS: dict[Build, tuple[str, str]] = {
    sgd_with_the_rate_of_adam: ("LORA305", "1e-06"),
    adam_with_the_rate_of_nothing: ("LORA305", "hardly moves"),
    rate_of_one: ("LORA304", "learning rate of 1"),
    sgd_that_diverges: ("LORA304", "its own size"),
    schedule_that_ended_early: ("LORA303", "zero from step 4 on"),
    no_rate_for_b: ("LORA303", "lora_B is 0"),
    next_to_no_rate_for_b: ("LORA305", "1e-09 of lora_B"),
    schedule_that_takes_nearly_all: ("LORA305", "a learning rate of 1e-09"),
    constant_rate_of_zero: ("LORA303", "learning rate is 0"),
    clipped_to_next_to_nothing: ("LORA307", "clipped to 1e-09"),
    decay_of_a_hundred: ("LORA306", "weight_decay=100"),
    misses_the_magnitudes: ("LORA301", "magnitudes"),
    misses_the_token_rows: ("LORA301", "embedding rows"),
    misses_some_layers: ("LORA301", "misses lora_B"),
    made_before_the_adapter: ("LORA301", "frozen base weights"),
    decayed_within_a_few_steps: ("LORA305", "decay"),
    warm_up_of_ten_thousand_steps: ("LORA305", "warm-up"),
    eps_of_one: ("LORA305", "eps=1 outweighs"),
    sgd_that_is_slow_and_flat: ("LORA305", "0.0002"),
    scheduler_stepped_once_an_epoch: ("LORA303", "not stepped"),
    forgot_the_language: ("LORA304", "diverged"),
    exploded_so_far: ("LORA304", "rose from 2.1 to 9.8"),
    lost_in_the_rounding_of_bfloat16: ("LORA315", "bfloat16"),
    optimizer_of_another_rank: ("LORA319", "another rank"),
}


def frozen_a() -> Report:
    model = adapted()
    for parameter in trainable(model, "lora_A"):
        parameter.requires_grad_(False)
    return check_training(model, language_batch(), optimizer=adam(model))


def optimizer_of_b_alone() -> Report:
    model = adapted()
    return check_training(
        model, language_batch(), optimizer=torch.optim.AdamW(trainable(model, "lora_B"), lr=1e-3)
    )


def lora_plus() -> Report:
    model = adapted()
    groups = [
        {"params": trainable(model, "lora_A"), "lr": 2e-4},
        {"params": trainable(model, "lora_B"), "lr": 2e-4 * 16},
    ]
    return check_training(model, language_batch(), optimizer=torch.optim.AdamW(groups, weight_decay=0.0))


def warm_up() -> Report:
    model = adapted()
    optimizer = adam(model)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler)


def finished_linear_schedule() -> Report:
    model = adapted()
    optimizer = adam(model)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 8))
    for _ in range(8):
        scheduler.step()
    falling = [4.9 - 0.1 * i for i in range(8)]
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler, history=falling)


def rate_made_by_the_schedule() -> Report:
    model = adapted()
    optimizer = adam(model, 1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1e-3 * min((step + 1) ** -0.5, (step + 1) / 1000))
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=scheduler)


def bfloat16_adapter() -> Report:
    model = adapted().to(torch.bfloat16)
    return check_training(model, language_batch(), optimizer=adam(model, 2e-4))


def scaler_with_float32_weights() -> Report:
    model = adapted()
    return check_training(
        model, language_batch(), optimizer=adam(model), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16)
    )


def scaler_that_is_off() -> Report:
    model = adapted().to(torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return check_training(model, language_batch(), optimizer=adam(model), scaler=scaler)


def sgd_with_momentum() -> Report:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    return check_training(model, language_batch(), optimizer=optimizer)


def adafactor_with_its_own_rate() -> Report:
    model = adapted()
    optimizer = Adafactor(trainable(model), lr=None, relative_step=True, warmup_init=True)
    return check_training(model, language_batch(), optimizer=optimizer)


def preference_tuning_rate() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, 5e-7))


def two_models_in_one_optimizer() -> Report:
    model, other = adapted(), nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([*trainable(model), *other.parameters()], lr=1e-3)
    return check_training(model, language_batch(), optimizer=optimizer)


def warm_up_has_just_begun() -> Report:
    model = adapted()
    optimizer = adam(model, lr=1e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, 500, 10_000)
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def warm_up_of_a_very_long_run_has_just_begun() -> Report:
    model = adapted()
    optimizer = adam(model, lr=2e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2_000, 100_000)
    for _ in FLAT:
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def decayed_after_the_loss_fell() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    model(**language_batch()).loss.backward()
    for _ in range(10):
        optimizer.step()
        schedule.step()
    history = [4.8 - 0.2 * i for i in range(10)]
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=history)


def recipe_tried_out_for_three_steps() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 3)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def schedule_at_its_last_step() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def schedule_that_asks_for_the_loss() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def schedule_of_schedules() -> Report:
    model = adapted()
    optimizer = adam(model)
    schedules = torch.optim.lr_scheduler
    schedule = schedules.SequentialLR(
        optimizer,
        [schedules.LinearLR(optimizer, 0.01, 1.0, 5), schedules.CosineAnnealingLR(optimizer, 20)],
        [5],
    )
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule)


def eps_for_half_precision() -> Report:
    model = adapted()
    return check_training(model, language_batch(), optimizer=adam(model, eps=1e-5), history=FLAT)


def end_of_a_cosine() -> Report:
    model = adapted()
    optimizer = adam(model, lr=1e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 20)
    model(**language_batch()).loss.backward()
    for _ in range(17):
        optimizer.step()
        schedule.step()
    return check_training(model, language_batch(), optimizer=optimizer, scheduler=schedule, history=FLAT)


def resumed_in_bfloat16() -> Report:
    model = adapted().bfloat16()
    with torch.no_grad():
        for parameter in trainable(model, "lora_B"):
            parameter.normal_(std=0.02)
    return check_training(model, language_batch(), optimizer=adam(model, lr=2e-4))


HEALTHY: tuple[Build, ...] = (
    frozen_a,
    optimizer_of_b_alone,
    lora_plus,
    warm_up,
    finished_linear_schedule,
    rate_made_by_the_schedule,
    bfloat16_adapter,
    scaler_with_float32_weights,
    scaler_that_is_off,
    sgd_with_momentum,
    adafactor_with_its_own_rate,
    preference_tuning_rate,
    two_models_in_one_optimizer,
    warm_up_has_just_begun,
    warm_up_of_a_very_long_run_has_just_begun,
    decayed_after_the_loss_fell,
    recipe_tried_out_for_three_steps,
    schedule_at_its_last_step,
    schedule_that_asks_for_the_loss,
    schedule_of_schedules,
    eps_for_half_precision,
    end_of_a_cosine,
    resumed_in_bfloat16,
)


@pytest.mark.parametrize("build", FAULTS, ids=lambda b: b.__name__)
def test_fault_is_named(build: Build) -> None:
    name_the_fault(build, *FAULTS[build])


@pytest.mark.parametrize("build", HEALTHY, ids=lambda b: b.__name__)
def test_healthy_training_is_left_alone(build: Build) -> None:
    leave_alone(build)
