"""A budget of recipes may name its cards, as everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_lora import check_recipe

RECIPE = """
base_model: meta-llama/Llama-3.1-70B
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
datasets:
  - path: data/train.jsonl
    type: alpaca
sequence_len: 1024
micro_batch_size: 1
learning_rate: 0.0002
fsdp_config:
  fsdp_version: 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    "given",
    [{"budget": "4x24GiB"}, {"budget": "4x24GiB", "gpus": 4}, {"budget": "24GiB", "gpus": 4}],
    ids=["in the budget", "both", "beside it"],
)
def test_cards_stand_in_the_budget_or_beside_it(recipe: Path, given: dict[str, Any]) -> None:
    (finding,) = check_recipe(recipe, select=["LORA650"], **given).findings
    assert "32.9 GiB on each of 4 cards, more than the 24.0 GiB of memory of one" in finding.observed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": "4x24GiB", "gpus": 2}, "names 4 cards, and gpus 2; leave one of them out"),
        ({"budget": "0x24GiB"}, "names no card"),
        ({"gpus": 0}, "gpus must be at least 1"),
    ],
    ids=["others", "none", "no GPU"],
)
def test_cards_that_do_not_go_together_are_refused(recipe: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_recipe(recipe, **given)


@pytest.mark.parametrize(
    ("line", "other", "reason"),
    [
        (
            "micro_batch_size: 1",
            "micro_batch_size: many",
            "batch, length, dtype or quantization of the step not known",
        ),
        (
            "sequence_len: 1024",
            "sequence_len: 99999999999",
            "step not estimated: seq_len must be at most 16,777,216",
        ),
    ],
    ids=["no batch", "no length that there is"],
)
def test_a_step_that_is_not_estimated_is_said_to_be_not_judged(
    recipe: Path, line: str, other: str, reason: str
) -> None:
    recipe.write_text(RECIPE.replace(line, other))
    report = check_recipe(recipe, budget="8x80GiB")
    ((why, rules),) = report.not_judged
    assert why.startswith(reason), why
    assert "memory rules" in rules
    assert not [f for f in report.findings if f.code.startswith("LORA5")]
