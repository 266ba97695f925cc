"""Learning rates left over from another kind of training, and what the advised ones do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from pytest_lora import Report, check_training
from pytest_lora.bases import examples

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(**changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(examples.base, LoraConfig(**fields)).train()


def adam(model: Any, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def texts() -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = examples.batch
    return batch


def pairs() -> dict[str, torch.Tensor]:
    ids = texts()["input_ids"]
    return {"chosen_input_ids": ids[:2], "rejected_input_ids": ids[2:4]}


def score(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each whole text, shape (rows,)."""
    logits: torch.Tensor = model(input_ids=ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))


def preference_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
    with torch.no_grad(), model.disable_adapter():
        before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
    return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()


def judged(
    lr: float,
    steps: int | None,
    *,
    batch: dict[str, torch.Tensor] | None = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    history: list[float] | None = None,
    **changes: Any,
) -> Report:
    model = adapted(**changes)
    optimizer = adam(model, lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, steps) if steps else None
    given = texts() if batch is None else batch
    return check_training(
        model, given, optimizer=optimizer, scheduler=schedule, loss_fn=loss_fn, history=history
    )


def codes(report: Report) -> dict[str, str]:
    return {f.code: f.severity for f in report.findings}


def test_a_rate_of_full_fine_tuning_is_told_where_it_gets_nowhere() -> None:
    report = judged(2e-5, 63)
    assert codes(report) == {"LORA370": "warning"}
    assert "default of TRL's SFTConfig" in report.warnings[0].observed
    assert "0.41%" in report.warnings[0].observed
    assert not judged(2e-4, 63).findings
    assert not judged(2e-5, 3000).findings, "so many steps get somewhere"
    assert not judged(2e-5, 63, r=64, lora_alpha=256).findings, "a large scaling"
    assert not judged(2e-5, 10).findings, "a recipe tried out"
    assert not judged(2e-5, 63, history=[4.0, 3.8, 3.5, 3.3, 3.0, 2.9]).findings, "the loss fell"


def test_a_default_rate_is_an_info_where_the_steps_are_not_known() -> None:
    assert codes(judged(5e-5, None)) == {"LORA370": "info"}
    assert codes(judged(2e-5, None)) == {"LORA370": "info"}
    assert not judged(3e-5, None).findings, "a rate that somebody chose"


def test_an_adapter_that_goes_on_may_go_slowly() -> None:
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    optimizer = adam(model, 2e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, 63)
    assert not check_training(model, texts(), optimizer=optimizer, scheduler=schedule).findings


def test_the_advised_rate_learns_what_the_rate_of_full_fine_tuning_does_not() -> None:
    def fall(lr: float) -> float:
        model, batch = adapted(), texts()
        optimizer = adam(model, lr)
        schedule = get_cosine_schedule_with_warmup(optimizer, 3, 63)
        losses = []
        for _ in range(63):
            loss = model(**batch).loss
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        return 1 - losses[-1] / losses[0]

    told = judged(2e-5, 63).warnings[0].fix
    advised = float(told.rpartition("=")[2])
    assert advised == 2e-4
    assert fall(2e-5) < 0.01
    assert fall(advised) > 5 * fall(2e-5)
    assert not judged(advised, 63).findings


def test_a_rate_of_supervised_fine_tuning_for_preferences() -> None:
    assert codes(judged(2e-4, 400, batch=pairs(), loss_fn=preference_loss)) == {"LORA371": "warning"}
    assert codes(judged(2e-4, None, batch=pairs(), loss_fn=preference_loss)) == {"LORA371": "info"}
    assert codes(judged(2e-4, 10, batch=pairs(), loss_fn=preference_loss)) == {"LORA371": "info"}
    for rate in (5e-7, 5e-6, 5e-5):
        assert not judged(rate, 400, batch=pairs(), loss_fn=preference_loss).findings
    assert not judged(2e-4, 400).findings


def test_the_advised_rate_keeps_the_chosen_answers() -> None:
    def lost(lr: float) -> float:
        model, batch = adapted(target_modules="all-linear"), pairs()
        optimizer = adam(model, lr)
        before = score(model, batch["chosen_input_ids"]).mean().item()
        for _ in range(60):
            torch.autograd.backward(preference_loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        return abs(score(model, batch["chosen_input_ids"]).mean().item() - before)

    assert lost(5e-6) < 0.1 * lost(2e-4)
