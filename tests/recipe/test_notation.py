"""Advice of rules that know no recipe, in the notation of each tool."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_lora import Finding, check_recipe, check_run
from pytest_lora.changes import Advice, advise, advise_any, change, noun
from pytest_lora.checks.recipe_notation import in_its_notation, placed, smaller_step
from pytest_lora.facts.recipe import RecipeFacts, RunSetting
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
        assert finding.changes
        assert all(
            one.said in finding.fix and one.said.startswith(("write", "remove")) for one in finding.changes
        )
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


ALL = {"target_modules": "all-linear"}
ROWS = {"trainable_token_indices": {"embed_tokens": range(5, 7)}}
MANY = {"trainable_token_indices": {"embed_tokens": range(5, 46)}}


@pytest.mark.parametrize(
    ("tool", "advice", "line"),
    [
        ("axolotl", advise(change("write", **ALL), ", as text"),
         "write `lora_target_linear: true` in place of `lora_target_modules`, as text"),
        ("llamafactory", advise(change("use", **ALL)), "write `lora_target: all`"),
        ("llamafactory", advise(change("set", target_modules=".*q")),
         "target_modules='.*q' (LLaMA-Factory takes names and no patterns)"),
        ("llamafactory", advise(change(target_modules=("q", "v"))), "write `lora_target: q,v`"),
        ("ms-swift", advise(change("set", target_modules=".*q")),
         "write `target_regex: .*q` in place of `target_modules`"),
        ("trl", advise(change("set", target_modules=("q_proj",))), r"write `lora_target_modules: .*\bq_proj`"),
        ("trl", advise(change("set", rank_pattern={"q_proj": 4})),
         "rank_pattern={'q_proj': 4} (for which TRL has no key)"),
        ("trl", advise(change("set", rank_pattern={"q": 4}, r=8)),
         "rank_pattern={'q': 4} (for which TRL has no key), write `lora_r: 8`"),
        ("trl", advise(change("set", r=8, rank_pattern={"q": 4})),
         "write `lora_r: 8` and rank_pattern={'q': 4} (for which TRL has no key)"),
        ("axolotl", advise(change("set", r=8, lora_alpha=16.0), ", which"),
         "write `lora_r: 8` and `lora_alpha: 16`, which"),
        ("axolotl", advise("rows: ", change(**ROWS)),
         "rows: write `peft_trainable_token_indices: {embed_tokens: [5, 6]}`"),
        ("axolotl", advise("rows: ", change(**MANY)),
         "rows: trainable_token_indices={'embed_tokens': list(range(5, 46))}"),
        ("axolotl", advise("keep it: ", change(alpha_pattern={"q": 16.0, "v": 1.5})),
         "keep it: write `lora_alpha_pattern: {q: 16, v: 1.5}`"),
        ("own", advise("drop it: ", change(exclude_modules=None), "; ", change("set", lora_dropout=0.1), "."),
         "drop it: remove `exclude_modules`; write `lora_dropout: 0.1`."),
        ("axolotl", advise(change("set", modules_to_save=(), target_modules=("q",), r=4)),
         "remove `lora_modules_to_save` and write `lora_target_modules: [q]` and `lora_r: 4`"),
        ("axolotl", advise("with ", noun(r=4, modules_to_save=())),
         "with `lora_r: 4` and remove `lora_modules_to_save`"),
    ],
)  # fmt: skip
def test_changes_become_lines(settings: dict[str, RunSetting], tool: str, advice: Advice, line: str) -> None:
    assert in_its_notation(advice.text, advice.changes, settings[tool]) == line


def test_what_makes_a_step_smaller_is_named_by_the_keys_of_the_recipe(
    settings: dict[str, RunSetting],
) -> None:
    advice = advise(
        "take a smaller batch_size, a shorter seq_len or ", noun(quantization="nf4"), "; check_memory"
    )
    assert [
        smaller_step(advice.text, advice.changes, settings[tool]).partition(";")[0]
        for tool in ("axolotl", "ms-swift", "trl")
    ] == [
        "take a smaller `micro_batch_size`, a shorter `sequence_len` or `adapter: qlora` and `load_in_4bit: true`",
        "take a smaller `per_device_train_batch_size`, a shorter `max_length` or `quant_method: bnb` and "
        "`quant_bits: 4`",
        "take a smaller `per_device_train_batch_size`, a shorter `max_length` or `load_in_4bit: true`",
    ]
    half = advise("such as ", noun(seq_len=512))
    assert smaller_step(half.text, half.changes, settings["trl"]) == "such as `max_length: 512`"


PLACES = [
    ("axolotl", [{"lora_alpha": 4}], "axolotl:4: lora_alpha"),
    ("trl", [{"r": 4, "lora_alpha": 8}], "trl: lora_r"),
    ("trl", [{"target_parameters": ("x",), "lora_dropout": 0.0}], "trl:4: lora_target_modules"),
    (
        "axolotl",
        [{"ensure_weight_tying": True}, {"modules_to_save": None}],
        "axolotl:6: lora_modules_to_save",
    ),
    ("llamafactory", [{"rank_pattern": {"q": 4}}], "llamafactory:6: lora_rank"),
    ("own", [{"init_lora_weights": True}], "own:6: target_modules"),
    ("own", [], "own:6: target_modules"),
]


@pytest.mark.parametrize(("tool", "changes", "place"), PLACES)
def test_a_finding_is_at_the_line_of_what_it_changes(
    tool: str, changes: list[dict[str, Any]], place: str, settings: dict[str, RunSetting]
) -> None:
    fix = advise_any(change(**one) for one in changes)
    finding = Finding("X1", "x", "error", "there", "o", "e", fix.text or "mend it", changes=fix.changes)
    found = placed(finding, RecipeFacts(tool), settings[tool])
    assert found.where == f"{place} (there)"
    assert found.line == (int(place.split(":")[1]) if place.count(":") > 1 else None)


def test_advice_on_a_script_stays_python(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=2e-4, use_cpu=True)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "c_attn"], task_type="CAUSAL_LM")
    (finding,) = (f for f in check_run(args, config, BASE).findings if f.code == "LORA104")
    assert "drop the name: target_modules=['q_proj']" in finding.fix
