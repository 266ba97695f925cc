"""What a loss is taken over and held against: targets, references, and steps that short dtypes lose."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pytest_lora import Expect, check_training
from pytest_lora.facts.training import Objective
from pytest_lora.runs.watch import Watch
from tests.rules.test_rate_rules import adam, adapted, codes, pairs, preference_loss, score, texts

pytestmark = pytest.mark.filterwarnings("ignore")

COMPLETIONS = Expect(completion_only=True)


def closed(**changes: Any) -> dict[str, torch.Tensor]:
    """Texts of their own, each closed by the end token."""
    batch = {name: tensor.clone() for name, tensor in texts().items()}
    batch["input_ids"][batch["input_ids"] == 2] = 7
    batch["input_ids"][:, -1] = 2
    batch["labels"] = batch["input_ids"].clone()
    return batch


# ------------------------------------------------------------------ targets


def test_prompts_that_are_targets() -> None:
    report = check_training(adapted(), closed(), expect=COMPLETIONS)
    assert codes(report) == {"LORA373": "error"}
    assert "100 %" in report.errors[0].observed
    assert codes(check_training(adapted(), closed())) == {"LORA373": "info"}
    assert not check_training(adapted(), texts()).findings, "packed texts, which have no prompts"


def test_masked_prompts_are_left_alone() -> None:
    batch = closed()
    batch["labels"][:, :8] = -100
    assert not check_training(adapted(), batch, expect=COMPLETIONS).findings


def test_padding_that_is_masked_is_no_prompt() -> None:
    batch = closed()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 10:] = 0
    batch["input_ids"][0, 9:] = 2
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert "LORA373" in codes(check_training(adapted(), batch, expect=COMPLETIONS))


def test_an_expectation_of_another_type_is_refused() -> None:
    wrong: Any = "yes"
    with pytest.raises(TypeError, match="completion_only must be True or False"):
        Expect(completion_only=wrong)


# ------------------------------------------------------------------ references


def trained() -> Any:
    """An adapter after some steps of supervised fine-tuning on the chosen answers."""
    model = adapted()
    optimizer = adam(model, 1e-2)
    ids = pairs()["chosen_input_ids"]
    for _ in range(10):
        torch.autograd.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    return model


def against(reference: str, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of DPO against a frozen adapter."""
    gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
    with torch.no_grad():
        model.set_adapter(reference)
        before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        model.set_adapter("default")
    return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()


def test_a_reference_without_the_adapter_that_was_trained_before() -> None:
    model = trained()
    report = check_training(model, pairs(), optimizer=adam(model, 5e-6), loss_fn=preference_loss)
    assert codes(report) == {"LORA372": "warning"}
    assert "disabled for the reference" in report.warnings[0].observed


def test_both_remedies_begin_at_ln_2() -> None:
    config = adapted().peft_config["default"]
    merged = get_peft_model(trained().merge_and_unload(), config)
    assert preference_loss(merged, pairs()).item() == pytest.approx(math.log(2), abs=1e-5)
    optimizer = adam(merged, 5e-6)
    assert not check_training(merged, pairs(), optimizer=optimizer, loss_fn=preference_loss).findings

    model = trained()
    model.add_adapter("reference", config)
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if ".reference." in name:
            parameter.data.copy_(weights[name.replace(".reference.", ".default.")])
    model.set_adapter("default")
    loss_fn = partial(against, "reference")
    assert loss_fn(model, pairs()).item() == pytest.approx(math.log(2), abs=1e-5)
    report = check_training(model, pairs(), optimizer=adam(model, 5e-6), loss_fn=loss_fn)
    assert "LORA372" not in codes(report)


def test_a_run_that_goes_on_and_a_fresh_adapter_are_left_alone() -> None:
    fresh = adapted()
    assert not check_training(fresh, pairs(), optimizer=adam(fresh, 5e-6), loss_fn=preference_loss).findings
    shifted = check_training(
        fresh,
        pairs(),
        optimizer=adam(fresh, 5e-6),
        loss_fn=lambda model, batch: preference_loss(model, batch) + 0.5,
    )
    assert not shifted.findings, "a loss of another kind, or of two"
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-7)
    assert not check_training(fresh, pairs(), optimizer=adam(fresh, 5e-6), loss_fn=preference_loss).findings
    resumed = trained()
    optimizer = adam(resumed, 5e-6)
    torch.autograd.backward(preference_loss(resumed, pairs()))
    optimizer.step()
    assert not check_training(resumed, pairs(), optimizer=optimizer, loss_fn=preference_loss).findings


@pytest.mark.parametrize("name", ["reference", "critic"])
def test_a_reference_adapter_that_was_never_filled(name: str) -> None:
    model = trained()
    model.add_adapter(name, adapted().peft_config["default"])
    model.set_adapter("default")
    loss_fn = partial(against, name)
    report = check_training(model, pairs(), optimizer=adam(model, 5e-6), loss_fn=loss_fn)
    assert codes(report)["LORA372"] == "warning"
    assert f"adapter '{name}', zero everywhere, is the reference" in str(report)
    fresh = adapted()
    fresh.add_adapter(name, adapted().peft_config["default"])
    fresh.set_adapter("default")
    assert "LORA372" not in codes(
        check_training(fresh, pairs(), optimizer=adam(fresh, 5e-6), loss_fn=loss_fn)
    ), "policy and reference both begin at the base"

    others = {"first": pairs()["chosen_input_ids"], "second": pairs()["rejected_input_ids"]}

    def unnamed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return against(name, model, dict(zip(pairs(), batch.values(), strict=True)))

    report = check_training(model, others, optimizer=adam(model, 5e-6), loss_fn=unnamed)
    assert ("LORA372" in codes(report)) == (name == "reference"), "an adapter of another part is no reference"


def rewarded(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A policy gradient with a penalty for leaving the base."""
    gained = score(model, batch["ids"])
    with torch.no_grad(), model.disable_adapter():
        before = score(model, batch["ids"])
    weight = next(v for k, v in batch.items() if k != "ids")
    return (0.04 * (gained - before) - weight * (gained - gained.detach()).exp()).mean()


def test_a_policy_that_is_held_to_the_base_before_its_fine_tuning() -> None:
    model, ids = trained(), pairs()["chosen_input_ids"]
    batch = {"ids": ids, "advantages": torch.linspace(-1, 1, len(ids))}
    report = check_training(model, batch, optimizer=adam(model, 5e-6), loss_fn=rewarded)
    assert codes(report)["LORA372"] == "warning"
    assert "disabled for the reference" in str(report)
    distilled = {"ids": ids, "weights": batch["advantages"]}
    report = check_training(model, distilled, optimizer=adam(model, 5e-6), loss_fn=rewarded)
    assert "LORA372" not in codes(report), "a loss of one's own may hold the model to its base"
    fresh = adapted()
    report = check_training(fresh, batch, optimizer=adam(fresh, 5e-6), loss_fn=rewarded)
    assert "LORA372" not in codes(report)


@pytest.mark.parametrize(
    ("objective", "loss", "told"),
    [("DPO", 0.95, True), ("DPO", 0.6931, False), ("DPO", 0.4, False), ("preferences", 1.0, False)],
)
def test_the_first_loss_of_a_trainer_of_dpo(objective: Objective, loss: float, told: bool) -> None:
    model = adapted()
    optimizer = adam(model, 5e-6)
    watch = Watch(first_steps=2)
    for _ in range(2):
        torch.autograd.backward(preference_loss(model, pairs()))
        watch.before_step(model, optimizer, objective=objective)
        optimizer.step()
        watch.after_step()
        watch.log(loss)
    found = {f.code for report in watch.reports for f in report.findings}
    assert ("LORA372" in found) == told


# ------------------------------------------------------------------ short dtypes


def test_steps_that_lora_a_loses_in_rounding() -> None:
    model = adapted().bfloat16()
    report = check_training(model, texts(), optimizer=adam(model, 1e-5), select=["LORA315"])
    assert codes(report) == {"LORA315": "warning"}
    assert "lora_A what they were: it is lost in the rounding of bfloat16" in report.warnings[0].observed


def test_steps_that_bfloat16_holds_and_the_remedy() -> None:
    model = adapted().bfloat16()
    assert not check_training(model, texts(), optimizer=adam(model, 2e-3), select=["LORA315"]).findings
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        report = check_training(model, texts(), optimizer=adam(model, 1e-5), select=["LORA315"])
    assert not report.findings


def test_numbers_that_move_are_not_lost_whatever_their_scale() -> None:
    model = adapted().bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1e-3)
                parameter[:, :2] = 2.0
    assert not check_training(model, texts(), optimizer=adam(model, 1e-5), select=["LORA315"]).findings


def test_a_warm_up_is_no_loss_in_rounding() -> None:
    model = adapted().bfloat16()
    optimizer = adam(model, 2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 1000))
    report = check_training(model, texts(), optimizer=optimizer, scheduler=schedule, select=["LORA315"])
    assert not report.findings
