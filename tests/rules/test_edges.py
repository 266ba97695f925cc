"""Rules at the edges of what they look for: the last case that is fine, and the first that is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from torch import nn

from pytest_lora import Expect, Finding, check_recipe
from pytest_lora.bases.examples.models import BASES
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.inspection.config import config_facts
from pytest_lora.rules import find
from pytest_lora.rules.config.peft_refuses_the_config import _explained_elsewhere
from tests.namespace import run


def said(name: str, facts: object, expect: Expect | None = None) -> list[Finding]:
    rule = find(name)
    assert rule is not None
    return list(rule(facts, expect or Expect()))


def facts_of(base: str = "base", **fields: Any) -> ConfigFacts:
    return config_facts(LoraConfig(**{"r": 8, "lora_alpha": 16, **fields}), BASES[base]())


def test_experts_are_left_out_where_they_are_more_than_half_of_the_base() -> None:
    facts = facts_of("fused_moe_base", target_modules="all-linear")
    numbers = sum(p.numbers for p in facts.base.fused if p.name not in facts.adapted)
    half = replace(facts, base=replace(facts.base, parameters=2 * numbers))
    assert not said("fused_experts_are_left_out", half)
    more = replace(facts, base=replace(facts.base, parameters=2 * numbers - 1))
    assert len(said("fused_experts_are_left_out", more)) == 1


def test_lost_parameters_are_no_reason_to_target_everything() -> None:
    fields = {"target_parameters": ["experts.gate_up_proj"]}
    (found,) = said("target_matches_nothing", facts_of(target_modules=["q_proj"], **fields))
    assert "all-linear" not in found.fix
    (found,) = said("target_matches_nothing", facts_of(target_modules=[], **fields))
    assert "target_modules='all-linear'" in found.fix


def test_a_pattern_that_nothing_could_mean_is_not_repaired() -> None:
    (found,) = said("target_matches_nothing", facts_of(target_modules="nothing.*like.*it"))
    assert "fits no whole name" in found.fix


def test_a_head_that_peft_saves_by_itself_is_named_twice_only_in_a_configuration() -> None:
    fields = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "score"], "modules_to_save": ["score"]}
    facts = facts_of("classifier_base", **fields)
    assert said("target_is_also_saved", facts)
    assert not said("target_is_also_saved", replace(facts, live=True))
    other = facts_of("classifier_base", target_modules=["q_proj"], modules_to_save=["q_proj"])
    assert said("target_is_also_saved", replace(other, live=True))


@pytest.mark.parametrize(("beyond", "explained"), [(0, True), (1, True), (-1, False)])
def test_a_row_that_is_not_there_is_told_by_the_rule_on_rows(beyond: int, explained: bool) -> None:
    facts = facts_of(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]})
    row = (facts.base.vocab_size or 0) + beyond
    settings = replace(facts.settings, trainable_token_indices=(("embed_tokens", (5, row)),))
    assert _explained_elsewhere(replace(facts, settings=settings)) == explained


def test_a_field_that_is_unusable_is_told_beside_a_file_that_is() -> None:
    report = run(
        "path = adapter()\nconfigure(path, r=0)\ncut(path, 'adapter_model.safetensors', by=100)\n"
        "report = check_checkpoint(path)\n"
    )
    assert {finding.code for finding in report.errors} == {"LORA401", "LORA413"}


@pytest.mark.parametrize(("layers", "told"), [(8, True), (4, False)])
def test_a_gap_is_told_where_most_layers_are_there(layers: int, told: bool) -> None:
    """Three layers of four are no rule that a missing one could break."""
    report = run(
        f"path = adapter(num_hidden_layers={layers})\n"
        "edit(path, lambda t: {k: v for k, v in t.items() if 'layers.1.' not in k})\n"
        "report = check_checkpoint(path)\n"
    )
    found = [finding.observed for finding in report.findings if finding.code == "LORA424"]
    assert found == ["layers 1 are missing between layers that the file has"] * (2 if told else 0)


def test_numbers_that_are_not_finite_are_counted_of_both_kinds() -> None:
    spoiled = (
        "def spoil(tensors):\n"
        "    name = next(iter(tensors))\n"
        "    tensors[name][0, 0], tensors[name][0, 1] = float('nan'), float('inf')\n"
        "    return tensors\n"
    )
    report = run(f"path = adapter()\n{spoiled}\nedit(path, spoil)\nreport = check_checkpoint(path)\n")
    (found,) = [finding for finding in report.errors if finding.code == "LORA441"]
    assert found.observed.startswith("1 NaN and 1 infinite values in 1 of")


def test_what_is_excluded_around_targets_is_named_itself() -> None:
    facts = facts_of(target_modules="all-linear", exclude_modules=["mlp"])
    (found,) = said("exclusion_excludes_nothing", facts)
    assert found.fix.startswith("name the adapted modules themselves: exclude_modules=")
    facts = facts_of(target_modules=["gate_proj", "q_proj"], exclude_modules=["mlp"])
    (found,) = said("exclusion_excludes_nothing", facts)
    assert "exclude_modules=['gate_proj']" in found.fix


def test_a_rank_for_groups_of_channels_is_the_next_multiple() -> None:
    base = nn.Sequential(nn.Conv2d(64, 64, 3, groups=4))
    facts = config_facts(LoraConfig(r=6, lora_alpha=16, target_modules=["0"]), base)
    (found,) = said("peft_refuses_the_config", facts)
    assert found.fix.endswith("r=8")


AXOLOTL = """
base_model: Qwen/Qwen2.5-0.5B
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
datasets: [{path: data/train.jsonl, type: alpaca}]
micro_batch_size: 2
learning_rate: 0.0002
"""
FACTORY = """
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
dataset: identity
template: qwen
output_dir: out
bf16: true
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dtype: bfloat16
dataset_name: trl-lib/Capybara
use_peft: true
lora_target_modules: [q_proj, v_proj]
output_dir: out
bf16: true
"""
SWIFT = """
model: Qwen/Qwen2.5-0.5B
tuner_type: lora
dataset: [data/train.jsonl]
torch_dtype: bfloat16
"""

RECIPES: list[tuple[str, str, str]] = [
    ("LORA621", FACTORY + "learning_rate: 2.0e-4\n", ""),
    ("LORA621", FACTORY.replace("sft", "dpo") + "learning_rate: 1.0e-7\nmax_steps: 10\n", "moves nothing"),
    ("LORA621", FACTORY.replace("sft", "dpo") + "learning_rate: 2.0e-6\nmax_steps: 10\n", ""),
    ("LORA621", FACTORY.replace("sft", "ppo") + "learning_rate: 1.0e-7\nmax_steps: 10\n", ""),
    ("LORA620", FACTORY + "warmup_ratio: 1.5\n", "never ends"),
    ("LORA620", FACTORY + "warmup_ratio: 1.5\nwarmup_steps: 10\n", ""),
    ("LORA624", TRL + "packing: true\n", "nothing keeps them apart"),
    ("LORA624", TRL + "packing: true\nattn_implementation: flash_attention_2\n", ""),
    ("LORA624", SWIFT + "packing: true\n", "nothing keeps them apart"),
    ("LORA624", FACTORY + "packing: true\n", "nothing keeps them apart"),
    ("LORA624", FACTORY + "packing: true\nneat_packing: true\n", ""),
    ("LORA624", FACTORY.replace("sft", "pt") + "packing: true\n", ""),
    ("LORA624", AXOLOTL + "sample_packing: true\n", "nothing keeps them apart"),
    ("LORA624", AXOLOTL + "sample_packing: true\nattn_implementation: sdpa\n", ""),
]


@pytest.mark.parametrize(("code", "text", "words"), RECIPES)
def test_recipes(tmp_path: Path, code: str, text: str, words: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    found = [finding.observed for finding in check_recipe(recipe).findings if finding.code == code]
    assert len(found) == bool(words), found
    assert all(words in observed for observed in found)
