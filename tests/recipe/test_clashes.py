"""Keys that do not go together, words that a tool does not take, patterns of ranks: judged, at their lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from pytest_lora import check_recipe
from pytest_lora.facts.recipe_lines import Clash
from pytest_lora.findings import Finding
from pytest_lora.inspection.recipe import recognised
from pytest_lora.inspection.recipe.clashes import NEEDS, PAIRS, clashes
from pytest_lora.inspection.recipe.schema import JUDGED_APART, known_keys
from pytest_lora.inspection.recipe.yaml_file import read_yaml
from tests.recipe.test_tools import AXOLOTL, FACTORY, OWN, SWIFT, TRL, setting

RECIPES = {"axolotl": AXOLOTL, "llamafactory": FACTORY, "trl": TRL, "ms-swift": SWIFT, "": OWN}
LORA = "model_name_or_path: Qwen/Qwen2.5-0.5B\nlora_r: 4\nlora_alpha: 8\ntarget_modules: [q_proj, v_proj]\n"


def found(text: str, folder: Path, code: str) -> list[Finding]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(text)
    return [one for one in check_recipe(recipe).findings if one.code == code]


def told(lines: list[str]) -> list[Clash]:
    seen = recognised(read_yaml("\n".join(lines).encode()))
    assert seen is not None
    tool, keys = seen
    return list(clashes(keys, tool))


@pytest.mark.parametrize("tool", RECIPES)
def test_each_pair_is_told_at_its_line_and_only_where_both_are_on(tool: str) -> None:
    start = RECIPES[tool]
    for pair in PAIRS[tool]:
        lines = [*start.splitlines(), f"{pair.other}: 3", f"{pair.key}: 2"]
        (one,) = told(lines)
        assert one == Clash(pair.key, len(lines), pair.other, pair.why, pair.stops)
        for off in ("false", "0", "", "auto", "${WHAT}", "[]"):
            assert not told([*lines[:-1], f"{pair.key}: {off}"]), off
        for on in ("[x]", "{x: 1}") if tool else ("[x]",):  # of one's own, a block holds keys
            assert told([*lines[:-1], f"{pair.key}: {on}"]), on


@pytest.mark.parametrize(
    ("lines", "severity"),
    [("eval_steps: 3\nevals_per_epoch: 2", "error"), ("bf16: true\nfp16: true", "warning")],
)
def test_the_words_on_a_pair(lines: str, severity: str, tmp_path: Path) -> None:
    (one,) = found(f"{AXOLOTL}{lines}", tmp_path, "LORA605")
    other, key = (line.partition(":")[0] for line in lines.splitlines())
    assert (one.line, one.severity, one.where) == (4, severity, f"recipe.yaml:4: {key}")
    assert one.fix == f"remove `{key}`, or `{other}`"


def test_a_key_that_needs_another(tmp_path: Path) -> None:
    start = f"{FACTORY}eval_strategy: steps\n"
    (one,) = found(start, tmp_path, "LORA605")
    assert (one.line, one.severity, one.fix) == (
        4,
        "error",
        "add `val_size` or `eval_dataset`, or remove `eval_strategy`",
    )
    assert found(f"{start}val_size: 0.0\n", tmp_path, "LORA605")
    for mended in (
        f"{start}val_size: 0.1\n",
        f"{start}eval_dataset: mine\n",
        f"{start}val_size: ${{HELD_OUT}}\n",
        FACTORY.replace("sft", "ppo") + "reward_model: mine\n",
        f'{FACTORY}eval_strategy: "no"\n',
    ):
        assert not found(mended, tmp_path, "LORA605"), mended
    assert found(FACTORY.replace("sft", "ppo"), tmp_path, "LORA605")


@pytest.mark.parametrize(
    ("lines", "stage", "told"),
    [
        ("quantization_bit: 8", 3, ["quantization_bit"]),
        ("quantization_bit: 8", 2, []),
        ("quantization_bit: 4", 3, []),
        ("pure_bf16: true\nuse_unsloth: true", 3, ["pure_bf16", "use_unsloth"]),
        ("pure_bf16: false\npissa_init: true", 3, ["pissa_init"]),
        ("pissa_init: true", 2, []),
    ],
)
def test_what_divided_weights_exclude(lines: str, stage: int, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    seen = found(f"{FACTORY}deepspeed: ds.json\n{lines}\n", tmp_path, "LORA605")
    assert sorted(one.where.rpartition(" ")[2] for one in seen) == told
    assert all("`deepspeed`" in one.fix and "ZeRO-3" in one.observed for one in seen)


def test_keys_of_pairs_are_keys_of_their_tools() -> None:
    for tool, pairs in PAIRS.items():
        known = known_keys().get(tool)
        named = {name for pair in pairs for name in (pair.key, pair.other)}
        named |= {name for need in NEEDS.get(tool, ()) for name in (need.key, *need.others)}
        assert known is None or named - known["keys"] <= {"fsdp"}


@pytest.mark.parametrize(
    ("text", "severity", "fix"),
    [
        (f"{TRL}dtype: bf16\n", "error", "write `dtype: bfloat16`"),
        (f"{TRL}optim: lion_of_my_own\n", "error", "write one of these words after `optim:`"),
        (f"{SWIFT}torch_dtype: fp16\n", "error", "write `torch_dtype: float16`"),
        (f"{FACTORY}lr_scheduler_type: cosin\n", "warning", "write `lr_scheduler_type: cosine`"),
        (
            f"{AXOLOTL}excess_length_strategy: cut\n",
            "error",
            "write one of these words after `excess_length_strategy:`",
        ),
    ],
)
def test_words_that_a_tool_does_not_take(text: str, severity: str, fix: str, tmp_path: Path) -> None:
    (one,) = found(text, tmp_path, "LORA604")
    assert (one.severity, one.fix, one.line) == (severity, fix, len(text.splitlines()))
    assert one.expected.startswith("one of ")


def test_words_that_are_taken_or_cannot_be_told(tmp_path: Path) -> None:
    for text in (
        f"{TRL}dtype: bfloat16\nlr_scheduler_type: cosine\n",
        f"{TRL}dtype: ${{DTYPE}}\n",
        f"{AXOLOTL}optimizer: one_of_my_own\nlr_scheduler: one_of_my_own\n",
        f"{FACTORY}quantization_bit: 4\nquantization_method: bitsandbytes\n",  # LORA610's
        f"{OWN}dtype: bf16\n",
    ):
        assert not found(text, tmp_path, "LORA604"), text
    assert "dtype" in known_keys()["trl"]["choices"]
    assert "optimizer" not in known_keys()["axolotl"]["choices"]
    assert "quantization_method" in JUDGED_APART & known_keys()["llamafactory"]["choices"].keys()


def test_patterns_of_ranks_are_read() -> None:
    text = "rank_pattern:\n  q_proj: 16\n  v_proj: many\nalpha_pattern:\n  q_proj: 8\n"
    own = setting(f"{OWN}{text}")
    assert (own.rank_pattern.value, own.alpha_pattern.value) == ({"q_proj": 16}, {"q_proj": 8})
    theirs = setting(f"{AXOLOTL}lora_{text}")
    assert (theirs.rank_pattern.value, theirs.rank_pattern.key) == ({"q_proj": 16}, "lora_rank_pattern")
    assert setting(OWN).rank_pattern.value is None


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("rank_pattern: {attention.q_proj: 8}", "LORA107"),
        ("layers_to_transform: [23, 24]", "LORA105"),
    ],
)
def test_findings_stand_at_the_line_of_their_own_key(line: str, code: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    (one,) = found(f"{LORA}{line}\n", tmp_path, code)
    assert (one.line, one.where.partition(" (")[0]) == (5, f"recipe.yaml:5: {key}")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="transformers 5 fuses experts; before, each had layers",
)
def test_advice_to_add_parameters_stands_at_the_targets(tmp_path: Path) -> None:
    text = LORA.replace("Qwen/Qwen2.5-0.5B", "Qwen/Qwen1.5-MoE-A2.7B").replace(
        "q_proj, v_proj", "q_proj, up_proj"
    )
    (one,) = found(text, tmp_path, "LORA129")
    assert (one.line, one.where.partition(" (")[0]) == (4, "recipe.yaml:4: target_modules")


def test_a_task_type_stands_at_its_line(tmp_path: Path) -> None:
    text = "model_name_or_path: google/flan-t5-base\nlora_r: 4\nlora_alpha: 8\ntarget_modules: [q, v]\n"
    (one,) = found(f"{text}task_type: CAUSAL_LM\n", tmp_path, "LORA122")
    assert (one.line, one.where.partition(" (")[0]) == (5, "recipe.yaml:5: task_type")


def test_new_tokens_stand_at_the_line_that_adds_them(tmp_path: Path) -> None:
    text = "model: Qwen/Qwen2.5-7B\ntuner_type: lora\ndataset: data\nmax_length: 512\nnew_special_tokens: [<a>, <b>]\n"
    assert {one.line for one in found(text, tmp_path, "LORA119")} == {5}


def test_a_language_model_that_is_frozen_is_not_adapted(tmp_path: Path) -> None:
    text = "model: Qwen/Qwen2.5-VL-3B-Instruct\ntuner_type: lora\ndataset: data\nmax_length: 512\nfreeze_llm: true\n"
    (one,) = found(text, tmp_path, "LORA124")
    assert (one.line, one.fix.partition("remove ")[2]) == (5, "`freeze_llm`")
    assert not found(f"{text}freeze_vit: false\n", tmp_path, "LORA124")


def test_float16_stands_where_bfloat16_gives_way() -> None:
    assert setting(f"{AXOLOTL}bf16: auto\nfp16: true\n").precision.value == "fp16"
    assert setting(f"{AXOLOTL}bf16: true\nfp16: true\n").precision.value == "bf16"
    assert setting(f"{AXOLOTL}bf16: auto\n").precision.value == "bf16"


def test_the_share_of_parameters_is_that_of_all_layers(tmp_path: Path) -> None:
    (one,) = found(
        f"{LORA}modules_to_save: [embed_tokens, lm_head]\n".replace("0.5B", "7B"), tmp_path, "LORA128"
    )
    assert one.observed.partition(" of ")[2].startswith("8,")  # billions, with the copies
