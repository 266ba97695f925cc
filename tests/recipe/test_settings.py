"""The effective setting of recipes: which tool, which value, and where each is from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainingArguments

from pytest_lora.facts.recipe import RecipeFacts, RunSetting
from pytest_lora.inspection.recipe import recipe_facts
from pytest_lora.inspection.recipe.adapter import fused_arguments, step_arguments
from pytest_lora.inspection.recipe.beside import fsdp_version_of_arguments
from pytest_lora.inspection.recipe.schema import known_keys

AXOLOTL = "base_model: Qwen/Qwen2.5-7B\nadapter: lora\nlora_r: 16\nmicro_batch_size: 2\nlearning_rate: 1e-4\n"
FACTORY = "model_name_or_path: Qwen/Qwen2.5-7B\nstage: sft\ndo_train: true\nlora_rank: 16\n"
TRL = "model_name_or_path: Qwen/Qwen2.5-7B\nuse_peft: true\ndataset_name: data\n"
SWIFT = "model: Qwen/Qwen2.5-7B\ntuner_type: lora\ndataset: [data/train.jsonl]\n"
OWN = "model:\n  name: Qwen/Qwen2.5-7B\nlora:\n  r: 16\n  alpha: 32\n  target_modules: [q_proj]\nlearning_rate: 1e-4\n"


def read(tmp_path: Path, text: str, **files: str) -> RecipeFacts:
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(content)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return recipe_facts(recipe)


def setting(tmp_path: Path, text: str, **files: str) -> RunSetting:
    found = read(tmp_path, text, **files).setting
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        (AXOLOTL, "Axolotl"),
        (FACTORY, "LLaMA-Factory"),
        (TRL, "TRL"),
        (SWIFT, "ms-swift"),
        (OWN, "your own script"),
    ],
)
def test_the_format_is_known_by_its_keys(tmp_path: Path, text: str, tool: str) -> None:
    facts = read(tmp_path, text)
    assert facts.tool == tool
    assert facts.base is not None
    assert facts.base.name == "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize(
    "text",
    [
        "services:\n  web:\n    image: x\n",
        "- a\n- b\n",
        "",
        AXOLOTL.replace("adapter: lora", "adapter:"),
        FACTORY + "finetuning_type: full\n",
        "model_name_or_path: a/b\nadapter_name_or_path: c\ntemplate: llama3\nexport_dir: d\n",
        "model_name_or_path: a/b\ndataset_name: data\nlearning_rate: 1.0e-5\n",
        SWIFT.replace("lora", "full"),
        "model: a/b\ntuner_type: lora\ntensor_model_parallel_size: 2\nmicro_batch_size: 1\n",
    ],
)
def test_what_trains_no_adapter_is_left_alone(tmp_path: Path, text: str) -> None:
    facts = read(tmp_path, text)
    assert facts.setting is None
    assert facts.left_alone


def test_every_value_says_where_it_is_from(tmp_path: Path) -> None:
    found = setting(tmp_path, FACTORY)
    assert (found.r.value, found.r.source, found.r.line) == (16, "line 4", 4)
    assert (found.lora_alpha.value, found.lora_alpha.source) == (32, "2 x lora_rank")
    assert (found.batch_size.value, found.batch_size.source) == (8, "default of LLaMA-Factory")
    assert found.scaling == 2.0


TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("dataset_name: talk.jsonl\n", "talk.jsonl"),
        ("dataset_name: text.jsonl\n", None),
        ("datasets: [{path: json, data_files: talk.jsonl}]\n", "talk.jsonl"),
        ("datasets: [{path: talk.jsonl}]\n", "talk.jsonl"),
        ("datasets: [{data_files: [text.jsonl, talk.jsonl]}]\n", "talk.jsonl"),
        ("datasets: [{split: train}, {data_files: []}, {data_files: {a: 1}}, talk.jsonl]\n", None),
        ("datasets: [{split: train}, {path: text.jsonl}, {path: late.jsonl}]\n", "late.jsonl"),
    ],
)
def test_the_first_data_beside_a_recipe_of_trl_that_are_conversations(
    tmp_path: Path, text: str, found: str | None
) -> None:
    data = {"talk__jsonl": TALK, "text__jsonl": '{"text": "a"}\n' * 2 + TALK, "late__jsonl": "{}\n" + TALK}
    model = TRL.replace("dataset_name: data\n", "")
    assert read(tmp_path, model + text, **data).conversational == found
    assert read(tmp_path, OWN + text, **data).conversational is None


def test_only_tools_of_omegaconf_put_values_in_the_place_of_names(tmp_path: Path) -> None:
    alpha = "lora_alpha: ${lora_rank}\n"
    assert setting(tmp_path, FACTORY + alpha).lora_alpha.value == 16
    assert setting(tmp_path, f"{TRL}lora_rank: 16\n{alpha}").lora_alpha.value is None


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        (AXOLOTL + "lora_target_linear: true\nlora_target_modules: [gate]\n", ("gate",)),
        (AXOLOTL + "lora_target_linear: true\nlora_target_modules: .*gate\n", ()),
        (AXOLOTL + "lora_target_linear: false\nlora_target_modules: [gate]\n", ()),
        (AXOLOTL + "lora_target_linear: true\n", ()),
        (TRL + "lora_target_linear: true\nlora_target_modules: [gate]\n", ()),
    ],
)
def test_axolotl_unites_listed_modules_with_all_linear_ones(
    tmp_path: Path, text: str, listed: tuple[str, ...]
) -> None:
    assert read(tmp_path, text).listed == listed


def test_axolotl_quantizes_to_4_bits_only_under_qlora(tmp_path: Path) -> None:
    asked = setting(tmp_path, AXOLOTL + "load_in_4bit: true\n").quantization
    assert (asked.value, asked.line) == (None, 6)
    assert asked.asked
    done = setting(tmp_path, AXOLOTL.replace("adapter: lora", "adapter: qlora") + "load_in_4bit: true\n")
    assert (done.quantization.value, done.quantization.asked) == ("nf4", None)


def test_a_list_of_one_is_an_expression_in_trl_alone(tmp_path: Path) -> None:
    assert setting(tmp_path, TRL + "lora_target_modules: [q_proj]\n").target_modules.value == "q_proj"
    assert setting(tmp_path, AXOLOTL + "lora_target_modules: [q_proj]\n").target_modules.value == ("q_proj",)
    assert setting(tmp_path, FACTORY + "lora_target: q_proj,v_proj\n").target_modules.value == (
        "q_proj",
        "v_proj",
    )


def test_text_that_is_a_number_is_a_number_where_the_tool_reads_it_so(tmp_path: Path) -> None:
    assert setting(tmp_path, AXOLOTL).learning_rate.value == 1e-4
    facts = read(tmp_path, AXOLOTL)
    assert facts.wrong == ()
    assert [one.mended for one in read(tmp_path, OWN).wrong] == ["1.0e-4"]


def test_strategies_come_from_files_beside_the_recipe_and_from_names(tmp_path: Path) -> None:
    stage = '{"zero_optimization": {"stage": 3}}'
    assert (
        setting(tmp_path, FACTORY + "deepspeed: ds__json\n".replace("__", "."), ds__json=stage).strategy.value
        == "zero3"
    )
    assert setting(tmp_path, SWIFT + "deepspeed: zero2\n").strategy.value == "zero2"
    accelerate = "distributed_type: FSDP\n"
    text = TRL + "accelerate_config: acc.yaml\n"
    assert setting(tmp_path, text, acc__yaml=accelerate).strategy.value == "fsdp1"
    second = accelerate + "fsdp_config: {fsdp_version: 2, fsdp_offload_params: true}\n"
    assert setting(tmp_path, text, acc__yaml=second).strategy.value == "fsdp2_offload"


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        (AXOLOTL + "fsdp_config: {reshard_after_forward: true}\n", "fsdp1"),
        (AXOLOTL + "fsdp_version: 2\nfsdp_config: {offload_params: true}\n", "fsdp2_offload"),
        (AXOLOTL + "fsdp_config: {fsdp_version: 2}\n", "fsdp2"),
        (AXOLOTL + "fsdp: [full_shard, auto_wrap]\nfsdp_config: {version: '2'}\n", "fsdp2"),
        (FACTORY + "fsdp: full_shard auto_wrap\nfsdp_config: fsdp.json\n", "fsdp2"),
        (FACTORY + "fsdp: full_shard offload\nfsdp_config: {version: 1}\n", "fsdp1_offload"),
        (SWIFT + "fsdp: fsdp2\n", "fsdp2"),
        (TRL + "accelerate_config: fsdp2\n", "fsdp2"),
        (TRL + "accelerate_config: fsdp1\n", "fsdp1"),
        (TRL + "fsdp: full_shard\n", f"fsdp{fsdp_version_of_arguments()}"),
    ],
)
def test_the_version_of_fsdp_is_the_one_that_runs(tmp_path: Path, text: str, strategy: str) -> None:
    assert setting(tmp_path, text, fsdp__json='{"fsdp_version": 2}').strategy.value == strategy


def test_arguments_without_a_version_have_that_of_the_installed_transformers(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), fsdp="full_shard", fsdp_config={}, use_cpu=True)
    said = getattr(arguments, "fsdp_plugin_args", None) or {}
    assert said.get("fsdp_version", 1) == fsdp_version_of_arguments()


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    outside = tmp_path / "ds.json"
    outside.write_text('{"zero_optimization": {"stage": 3}}')
    inside = tmp_path / "recipes"
    inside.mkdir()
    (inside / "link.json").symlink_to(outside)
    for name in ("../ds.json", str(outside), "link.json"):
        assert setting(inside, FACTORY + f"deepspeed: {name}\n").strategy.value is None


def test_interpolations_stand_for_their_values(tmp_path: Path) -> None:
    found = setting(tmp_path, OWN.replace("alpha: 32", "alpha: ${lora.r}"))
    assert found.lora_alpha.value == 16
    unknown = setting(tmp_path, OWN.replace("alpha: 32", "alpha: ${oc.env:ALPHA}"))
    assert unknown.lora_alpha.value is None


def test_unknown_keys_name_the_one_that_was_meant(tmp_path: Path) -> None:
    (one,) = read(tmp_path, AXOLOTL + "gradient_checkpoint: true\n").unknown
    assert (one.key, one.line, one.meant, one.stops) == (
        "gradient_checkpoint",
        6,
        "gradient_checkpointing",
        False,
    )
    (old,) = read(tmp_path, TRL + "torch_dtype: bfloat16\n").unknown
    assert (old.kind, old.meant) == ("renamed", "dtype")
    (gone,) = read(tmp_path, TRL + "group_by_length: true\n").unknown
    assert (gone.kind, gone.since) == ("removed", "transformers 5.15")
    (dropped,) = read(tmp_path, AXOLOTL + "lora_exclude_modules: [lm_head]\n").unknown
    assert dropped.kind == "dropped"
    (block,) = read(tmp_path, TRL + "lora:\n  r: 8\n").unknown
    assert block.kind == "block"


def test_keys_of_plugins_that_a_recipe_names_are_known(tmp_path: Path) -> None:
    plugin = "plugins:\n  - axolotl.integrations.liger.LigerPlugin\n"
    assert [u.key for u in read(tmp_path, AXOLOTL + "liger_rope: true\n").unknown] == ["liger_rope"]
    assert read(tmp_path, AXOLOTL + plugin + "liger_rope: true\n").unknown == ()
    assert read(tmp_path, AXOLOTL + "plugins: [ours.Plugin]\nours: 1\n").unknown == ()


def test_our_own_plugin_brings_its_key_and_no_other(tmp_path: Path) -> None:
    named = "plugins: [pytest_lora.runs.axolotl.LoraHealthPlugin]\nlora_health: {on_error: stop}\n"
    facts = read(tmp_path, f"{AXOLOTL}{named}gradient_checkpoint: true\n")
    assert [one.key for one in facts.unknown] == ["gradient_checkpoint"]


def test_the_keys_of_each_tool_are_data() -> None:
    known = known_keys()
    assert set(known) == {"axolotl", "llamafactory", "trl", "ms-swift"}
    assert all(len(one["keys"]) > 300 and one["version"] for one in known.values())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", "reentrant"),
        ("gradient_checkpointing_kwargs:\n  use_reentrant: true\n", "reentrant"),
        ("gradient_checkpointing_kwargs:\n  use_reentrant: false\n", True),
        ("gradient_checkpointing_kwargs:\n  preserve_rng_state: false\n", "reentrant"),
        ("rl: dpo\n", True),
        ("rl: dpo\ngradient_checkpointing_kwargs:\n  use_reentrant: true\n", "reentrant"),
    ],
)
def test_axolotl_checkpoints_with_reentry_but_for_preferences(
    tmp_path: Path, more: str, expected: object
) -> None:
    found = setting(tmp_path, f"{AXOLOTL}gradient_checkpointing: true\n{more}").gradient_checkpointing
    assert (found.value, found.stated) == (expected, True)


def test_only_values_of_numbers_are_judged_as_numbers(tmp_path: Path) -> None:
    text = OWN.replace("1e-4", "2e-4") + "run_name: 1e-4\nnote: 1,5\n"
    assert [(one.key, one.written) for one in read(tmp_path, text).wrong] == [("learning_rate", "2e-4")]


@pytest.mark.parametrize(
    ("more", "kernels"),
    [
        ("", {"kernels": "axolotl"}),
        ("fsdp_config:\n  fsdp_version: 1\n", {}),
        ("fsdp_config:\n  fsdp_version: 2\n", {}),
        ("fsdp_config:\n  fsdp_version: 1\n  fsdp_offload_params: true\n", {}),
        ("rl: dpo\n", {}),
        ("trust_remote_code: true\n", {}),
        ("load_in_8bit: true\n", {}),
        ("lora_qkv_kernel: false\nlora_mlp_kernel: false\nlora_o_kernel: false\n", {}),
        ("lora_qkv_kernel: true\n", {}),
        (
            "lora_qkv_kernel: true\nlora_mlp_kernel: true\nlora_o_kernel: true\nrl: dpo\n",
            {"kernels": "axolotl"},
        ),
    ],
)
def test_axolotl_takes_its_kernels_where_weights_are_whole(
    tmp_path: Path, more: str, kernels: dict[str, str]
) -> None:
    assert fused_arguments(setting(tmp_path, AXOLOTL + more)) == kernels


def test_a_step_in_float32_runs_without_autocast(tmp_path: Path) -> None:
    found = setting(tmp_path, f"{AXOLOTL}sequence_len: 512\n")
    dtypes = {d: replace(found, dtype=replace(found.dtype, value=d)) for d in ("float32", "bfloat16")}
    arguments = {dtype: step_arguments(one, None) or {} for dtype, one in dtypes.items()}
    assert arguments["float32"] == {**arguments["bfloat16"], "dtype": "float32", "autocast": False}


def test_an_expression_of_swift_stands_in_place_of_its_names(tmp_path: Path) -> None:
    regex = "target_regex: '.*\\.q_proj'\n"
    assert setting(tmp_path, SWIFT + regex).target_modules.value == r".*\.q_proj"
    both = setting(tmp_path, SWIFT + "target_modules: all-linear\n" + regex)
    assert both.target_modules.key == "target_regex"


def test_the_configuration_of_accelerate_is_a_key_of_trl(tmp_path: Path) -> None:
    facts = read(tmp_path, TRL + "accelerate_config: zero2\n")
    assert not facts.unknown
    assert facts.setting is not None
    assert facts.setting.strategy.value == "zero2"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (SWIFT.replace("data/train", "~/data/train"), "dataset"),
        (OWN.replace("Qwen/Qwen2.5-7B", "~/models/a"), "name"),
    ],
    ids=["in a list", "of a base"],
)
def test_a_path_that_nobody_expands_is_told_at_its_line(tmp_path: Path, text: str, key: str) -> None:
    (wrong,) = (one for one in read(tmp_path, text).wrong if one.written.startswith("~"))
    assert wrong.key == key
    assert "~" in text.splitlines()[wrong.line - 1]
