"""One mistake is told once: at its root, and not again by what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_lora.bases import examples
from pytest_lora.rules import catalogue, find, without_consequences
from tests.namespace import run

SETUP = """
config = LoraConfig(r=8, lora_alpha={alpha}, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)
{fault}
report = check_model(model, batches=batch, select={select})
"""

FAULTS = [
    ("LORA101", 0, ""),
    ("LORA201", 16, "model.requires_grad_(False)"),
    ("LORA202", 16, "model.base_model.disable_adapter_layers()"),
    ("LORA203", 16, "model.merge_adapter()"),
    ("LORA204", 16, "model.requires_grad_(True)"),
]


@pytest.mark.parametrize(("code", "alpha", "fault"), FAULTS)
def test_a_mistake_is_told_once(code: str, alpha: int, fault: str) -> None:
    report = run(SETUP.format(alpha=alpha, fault=fault, select=[]))
    assert {finding.code for finding in report.errors} == {code}


@pytest.mark.parametrize(("code", "alpha", "fault"), FAULTS)
def test_what_follows_from_it_is_told_where_the_root_is_not_asked_for(
    code: str, alpha: int, fault: str
) -> None:
    report = run(SETUP.format(alpha=alpha, fault=fault, select=["LORA3"]))
    assert {finding.code for finding in report.errors} <= {"LORA313", "LORA330"}
    assert report.errors


FROZEN_TOO = """
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)
layers = model.base_model.model.model.layers
layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)


def loss(model, batch):
    layers[1].mlp.up_proj.weight.data.mul_(1.1)
    return model(**batch).loss


trained = check_training(model, batch, loss_fn=loss)
report = check_model(model)
"""


def test_frozen_weights_that_change_are_told_beside_others_that_train() -> None:
    names: dict[str, Any] = {}
    exec(examples.with_imports(FROZEN_TOO), names)
    findings = without_consequences((*names["report"].findings, *names["trained"].findings))
    told = {(finding.code, "up_proj" in finding.where) for finding in findings if finding.severity == "error"}
    assert told == {("LORA204", False), ("LORA330", True)}


def test_roots_are_rules_that_exist() -> None:
    assert all(find(name) for known in catalogue() for name in known.because_of)
