"""Advice of rules that know no recipe, in the notation of each tool."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pytest_lora import Finding, check_recipe, check_run
from pytest_lora.checks.recipe_notation import in_its_notation, smaller_step
from pytest_lora.facts.recipe import RunSetting
from pytest_lora.inspection.recipe import recipe_facts

BASE = "Qwen/Qwen2.5-0.5B"
RECIPES = {
    "axolotl": f"""base_model: {BASE}
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj, c_attn]
lora_modules_to_save: [score]
micro_batch_size: 1
learning_rate: 2.0e-4
""",
    "llamafactory": f"""model_name_or_path: {BASE}
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj,c_attn
lora_rank: 16
lora_alpha: 1024
dataset: data
learning_rate: 2.0e-4
bf16: true
""",
    "trl": f"""model_name_or_path: {BASE}
dtype: bfloat16
use_peft: true
lora_target_modules: [q_proj, c_attn]
lora_dropout: 0.9
dataset_name: data
learning_rate: 2.0e-4
""",
    "ms-swift": f"""model: {BASE}
tuner_type: lora
target_modules: [q_proj, v_proj, c_attn]
modules_to_save: [score]
lora_rank: 16
lora_alpha: 32
dataset: data
""",
    "own": f"""model: {{name: {BASE}}}
learning_rate: 2.0e-4
lora:
  rank: 16
  alpha: 1024
  target_modules: [q_proj, v_proj, c_attn]
""",
}
_EDIT = re.compile(r"(write|remove) `([\w-]+)(?:: ([^`]*))?`")


@pytest.mark.parametrize("tool", RECIPES)
def test_the_lines_that_are_printed_mend_the_recipe(tool: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPES[tool])
    report = check_recipe(recipe)
    found = {f.code: f for f in report.findings if f.severity != "info"}
    assert {"LORA104"} < set(found) <= {"LORA103", "LORA104", "LORA110", "LORA121"}
    for finding in found.values():
        assert not re.search(r"\w=[\w\[{'\"]", finding.fix), finding.fix
        recipe.write_text(_mended(recipe.read_text(), finding))
    assert {f.severity for f in check_recipe(recipe).findings} <= {"info"}, recipe.read_text()


def _mended(text: str, finding: Finding) -> str:
    """The recipe with the first line that the fix prints, in the place of the line of its key."""
    verb, key, value = _EDIT.findall(finding.fix)[0]
    lines = text.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
    assert yaml.safe_load(f"{key}: {value}")
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    lines[at : at + 1] = [f"{indent}{key}: {value}"] if verb == "write" else []
    return "\n".join(lines)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, RunSetting]:
    found = {}
    for tool, text in RECIPES.items():
        (tmp_path / tool).write_text(text)
        setting = recipe_facts(tmp_path / tool).setting
        assert setting is not None
        found[tool] = setting
    return found


@pytest.mark.parametrize(
    ("tool", "advice", "line"),
    [
        ("axolotl", "write target_modules='all-linear', as text",
         "write `lora_target_linear: true` in place of `lora_target_modules`, as text"),
        ("llamafactory", "use target_modules='all-linear'", "write `lora_target: all`"),
        ("llamafactory", "set target_modules='.*q'",
         "target_modules='.*q' (LLaMA-Factory takes names and no patterns)"),
        ("ms-swift", "set target_modules='.*q'", "write `target_regex: .*q` in place of `target_modules`"),
        ("trl", "set target_modules=['q_proj']", r"write `lora_target_modules: .*\bq_proj`"),
        ("trl", "set rank_pattern={'q_proj': 4}", "rank_pattern={'q_proj': 4} (for which TRL has no key)"),
        ("axolotl", "set r=8, lora_alpha=16.0, which", "write `lora_r: 8` and `lora_alpha: 16`, which"),
        ("axolotl", "rows: trainable_token_indices={'embed_tokens': list(range(5, 7))}",
         "rows: write `peft_trainable_token_indices: {embed_tokens: [5, 6]}`"),
        ("own", "drop it: exclude_modules=None; set lora_dropout=0.1.",
         "drop it: remove `exclude_modules`; write `lora_dropout: 0.1`."),
        ("axolotl", "target_modules=tuple(x)", "target_modules=tuple(x)"),
    ],
)  # fmt: skip
def test_assignments_become_lines(settings: dict[str, RunSetting], tool: str, advice: str, line: str) -> None:
    assert in_its_notation(advice, settings[tool]) == line


def test_what_makes_a_step_smaller_is_named_by_the_keys_of_the_recipe(
    settings: dict[str, RunSetting],
) -> None:
    advice = 'take a smaller batch_size, a shorter seq_len or quantization="nf4"; check_memory, unless advise=False,'
    assert [
        smaller_step(advice, settings[tool]).partition(";")[0] for tool in ("axolotl", "ms-swift", "trl")
    ] == [
        "take a smaller `micro_batch_size`, a shorter `sequence_len` or `adapter: qlora` and `load_in_4bit: true`",
        "take a smaller `per_device_train_batch_size`, a shorter `max_length` or `quant_method: bnb` and "
        "`quant_bits: 4`",
        "take a smaller `per_device_train_batch_size`, a shorter `max_length` or `load_in_4bit: true`",
    ]
    assert smaller_step("such as seq_len=512", settings["trl"]) == "such as `max_length: 512`"


def test_advice_on_a_script_stays_python(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=2e-4, use_cpu=True)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "c_attn"], task_type="CAUSAL_LM")
    (finding,) = (f for f in check_run(args, config, BASE).findings if f.code == "LORA104")
    assert "drop the name: target_modules=['q_proj']" in finding.fix
