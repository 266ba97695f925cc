"""One mistake is told once: at its root, and not again by what follows from it."""

from __future__ import annotations

import pytest

from pytest_lora.rules import catalogue, find
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


def test_roots_are_rules_that_exist() -> None:
    assert all(find(name) for known in catalogue() for name in known.because_of)
