"""Recipes that go on from an adapter folder, which governs; and names that each tool reads in its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_lora import Finding, check_recipe

BASE = "Qwen/Qwen2.5-0.5B"
AXOLOTL = f"""base_model: {BASE}
adapter: lora
lora_model_dir: one
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
datasets: [{{path: a.jsonl, type: alpaca}}]
micro_batch_size: 1
learning_rate: 0.0002
gradient_checkpointing: true
"""
FACTORY = f"""model_name_or_path: {BASE}
adapter_name_or_path: one
stage: sft
do_train: true
lora_rank: 16
lora_target: q_proj,v_proj
dataset: mine
template: qwen
learning_rate: 1.0e-4
bf16: true
"""
SWIFT = f"""model: {BASE}
adapters: [one]
tuner_type: lora
lora_rank: 16
lora_alpha: 32
target_modules: [q_proj, v_proj]
dataset: [a.jsonl]
max_length: 512
learning_rate: 1e-4
"""
OWN = f"""model: {BASE}
adapter_path: one
lora_r: 16
lora_alpha: 32
target_modules: [q_proj, v_proj]
learning_rate: 0.0001
"""
EVERY = {"axolotl": AXOLOTL, "llamafactory": FACTORY, "swift": SWIFT, "own": OWN}
every_tool = pytest.mark.parametrize("recipe", EVERY.values(), ids=EVERY)


def found(tmp_path: Path, recipe: str, *select: str, **config: Any) -> tuple[Finding, ...]:
    saved = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"], **config}
    (tmp_path / "one").mkdir(exist_ok=True)
    (tmp_path / "one/adapter_config.json").write_text(json.dumps(saved))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    return check_recipe(path, select=select or ("LORA64",)).findings


@every_tool
def test_a_folder_that_agrees_is_left_alone(tmp_path: Path, recipe: str) -> None:
    assert not found(tmp_path, recipe, base_model_name_or_path=f"{BASE}-Instruct")
    assert not found(
        tmp_path, recipe, base_model_name_or_path="/home/me/merged", r=None, target_modules=".*q_proj"
    )


@every_tool
@pytest.mark.parametrize(
    ("config", "severity", "words"),
    [
        ({"target_modules": ["q_proj"]}, "warning", "has [q_proj], which governs"),
        ({"modules_to_save": ["lm_head"]}, "", ""),  # the recipe says nothing of them
        ({"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}, "error", "is for meta-llama/Llama-2-7b-hf"),
        ({"peft_type": "IA3"}, "error", "of another method (IA3)"),
        ({"r": 8}, "warning", "has rank 8"),
    ],
    ids=["targets", "saved", "base", "method", "rank"],
)
def test_a_folder_that_differs_is_told(
    tmp_path: Path, recipe: str, config: dict[str, Any], severity: str, words: str
) -> None:
    findings = found(tmp_path, recipe, **config)
    assert [f.severity for f in findings] == ([severity] if severity else [])
    assert all(words in f.observed and f.line for f in findings)


def test_what_only_a_default_says_is_no_difference(tmp_path: Path) -> None:
    assert not found(tmp_path, FACTORY, lora_alpha=16), (
        "LLaMA-Factory's own 2 x rank is no line of the recipe"
    )
    (told,) = found(tmp_path, AXOLOTL, lora_alpha=16)
    assert told.fix == "write `lora_alpha: 16`, or start without `lora_model_dir`"
    (told,) = found(tmp_path, AXOLOTL + "lora_modules_to_save: [lm_head]\n")
    assert "`lora_modules_to_save` says [lm_head]" in told.observed
    (told,) = found(tmp_path, AXOLOTL + "peft_use_rslora: true\n", use_rslora=False)
    assert "has false" in told.observed


def test_all_linear_modules_beside_a_folder_of_attention(tmp_path: Path) -> None:
    recipe = FACTORY.replace("lora_target: q_proj,v_proj", "lora_target: all")
    assert [f.code for f in found(tmp_path, recipe)] == ["LORA642"]
    assert not found(tmp_path, recipe, target_modules=["q_proj", "v_proj", "up_proj"])


def test_a_new_adapter_upon_a_merged_one_may_be_of_any_form(tmp_path: Path) -> None:
    new = FACTORY + "create_new_adapter: true\n"
    assert not found(tmp_path, new, r=8, target_modules=["q_proj"])
    quantized = new + "quantization_bit: 4\n"  # into which nothing is merged
    assert {f.code for f in found(tmp_path, quantized, r=8)} == {"LORA641"}
    last = FACTORY.replace("adapter_name_or_path: one", "adapter_name_or_path: zero,one")
    assert {f.code for f in found(tmp_path, last, r=8)} == {"LORA641"}


def test_llama_factory_takes_one_name_for_a_name(tmp_path: Path) -> None:
    alone = FACTORY.replace("adapter_name_or_path: one\n", "")
    assert not found(tmp_path, alone.replace("q_proj,v_proj", "q_proj"), "LORA104")
    assert found(tmp_path, alone.replace("q_proj,v_proj", ".*q_proj"), "LORA104")


def test_axolotl_s_special_tokens_are_new_ones(tmp_path: Path) -> None:
    tokens = "special_tokens: {{additional_special_tokens: ['{}']}}\n"
    plain = AXOLOTL.replace("lora_model_dir: one\n", "")
    assert found(tmp_path, plain + tokens.format("<tool>"), "LORA119")
    assert not found(tmp_path, plain + tokens.format("<|im_end|>"), "LORA119")
    assert not found(
        tmp_path,
        plain + tokens.format("<tool>") + "lora_modules_to_save: [embed_tokens, lm_head]\n",
        "LORA119",
    )


@pytest.mark.parametrize(("written", "told"), [("'16'", True), ("16", False), ("'${rank}'", False)])
def test_a_quoted_number_is_text(tmp_path: Path, written: str, told: bool) -> None:
    recipe = OWN.replace("lora_r: 16", f"lora_r: {written}").replace("adapter_path: one\n", "")
    assert bool(found(tmp_path, recipe, "LORA604")) == told
