"""Values of keys, keys that nothing reads, and files beside a recipe: each at its bounds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.facts.recipe import Value
from pytest_lora.facts.recipe_lines import UnknownKey, WrongKind
from pytest_lora.inspection.recipe import recognised
from pytest_lora.inspection.recipe.beside import (
    Tree,
    deepspeed_strategy,
    fsdp_strategy,
    fsdp_version,
    fsdp_version_of_arguments,
)
from pytest_lora.inspection.recipe.keys import (
    Keys,
    comma_separated,
    count,
    flag,
    names_in,
    number,
    resolved,
    word,
)
from pytest_lora.inspection.recipe.schema import unknown_keys, wrong_kinds
from pytest_lora.inspection.recipe.yaml_file import read_yaml
from tests.recipe.test_tools import AXOLOTL, FACTORY, OWN, SWIFT, TRL


def keys(text: str) -> Keys:
    return Keys(read_yaml(text.encode()).root, "a tool")


@pytest.mark.parametrize(
    ("written", "as_number", "as_count", "as_flag", "as_word"),
    [
        ("3", 3.0, 3, None, "3"),
        ("'2.5'", 2.5, 2, None, "2.5"),
        ("1e-4", 0.0001, 0, None, "1e-4"),
        ("1", 1.0, 1, True, "1"),
        ("0", 0.0, 0, False, "0"),
        ("true", None, None, True, "true"),
        ("no", None, None, False, "no"),
        ("'Yes '", None, None, True, "Yes "),
        ("'no'", None, None, False, "no"),
        (".nan", None, None, None, ".nan"),
        (".inf", None, None, None, ".inf"),
        ("1e999", None, None, None, "1e999"),
        (str(2**62), 2.0**62, 2**62, None, str(2**62)),
        (str(-(2**62)), -(2.0**62), -(2**62), None, str(-(2**62))),
        (str(2**63), 2.0**63, None, None, str(2**63)),
        (str(-(2**63)), -(2.0**63), None, None, str(-(2**63))),
        ("~", None, None, None, None),
        ("[1]", None, None, None, None),
        ("{a: 1}", None, None, None, None),
        ("x", None, None, None, "x"),
    ],
)
def test_what_a_value_is_as_each_kind(
    written: str, as_number: float | None, as_count: int | None, as_flag: bool | None, as_word: str | None
) -> None:
    node = (read_yaml(f"a: {written}".encode()).root.pairs or {})["a"]
    assert (number(node), count(node), flag(node), word(node)) == (as_number, as_count, as_flag, as_word)


def test_null_is_absent_and_what_is_filled_in_elsewhere_is_not_known() -> None:
    found = keys("a:\nb: []\nc: {}\nd: 3\ne: ${x}\nf: '${x}'\ng: $HOME/x\nh: ''\n")
    assert [name for name in "abcdefgh" if found.has(name)] == list("bcdefgh")
    assert found.count("a", "d") == Value(3, "line 4", "d", 4)
    assert found.count("d", "e").value == 3
    assert found.count("a", default=5) == Value(5, "default of a tool", "a")
    assert found.count("a", "z") == Value(None, "", "a")
    assert found.count("e", default=5) == Value(None, "line 5, which is filled in elsewhere", "e", 5)
    assert found.word("f") == Value("${x}", "line 6", "f", 6)
    assert found.word("g").value is None
    assert [line for *_, line in found.numbered()] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("written", "names"),
    [("[q, '', k]", ("q", "k")), ("q", "q"), ("[]", ()), ("~", None), ("{q: k}", None)],
)
def test_names_are_those_of_a_list_or_one_text(written: str, names: Any) -> None:
    node = (read_yaml(f"a: {written}".encode()).root.pairs or {})["a"]
    assert names_in(node) == names


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("q", "q"),
        ("q, ,k,", ("q", "k")),
        ("(q,k)", "(q,k)"),
        ("q,.*k", "q,.*k"),
        (3, 3),
        (("q", "k"), ("q", "k")),
    ],
)
def test_names_with_commas(value: Any, names: Any) -> None:
    assert comma_separated(value) == names


def test_interpolations_are_followed_so_many_times_and_only_to_values() -> None:
    chain = "".join(f"a{n}: ${{a{n + 1}}}\n" for n in range(10)) + "a10: 3\n"
    found = resolved(read_yaml(chain.encode()).root)
    pairs = found.pairs or {}
    assert (pairs["a1"].value, pairs["a1"].line) == (3, 2)
    assert pairs["a0"].value == "${a1}"
    text = "x: &x [1, '${b.c}', '${b.d}', '${b}', '${x}']\nb: {c: 2}\nagain: *x\nother: ${b.c.d}\nmore: a ${b.c}\n"
    assert resolved(read_yaml(text.encode()).root).unwrapped() == {
        "x": [1, 2, "${b.d}", "${b}", "${x}"],
        "b": {"c": 2},
        "again": [1, 2, "${b.d}", "${b}", "${x}"],
        "other": "${b.c.d}",
        "more": "a ${b.c}",
    }


def unknown(text: str) -> list[UnknownKey]:
    file = read_yaml(text.encode())
    found = recognised(file)
    assert found is not None
    return list(unknown_keys(found[1], found[0], file))


@pytest.mark.parametrize(
    ("text", "keys_told"),
    [
        (FACTORY + "gradient_checkpointing: false\n",
         [("gradient_checkpointing", 4, "gradient_checkpointing: false", "dropped", None, "", False)]),
        (FACTORY + "gradient_checkpointing: true\npacking: false\n", []),
        (FACTORY + "lora_ranks: 3\n", [("lora_ranks", 4, "lora_ranks: 3", "unknown", "lora_rank", "", True)]),
        ("zzzz_unlike: 3\n" + AXOLOTL, [("zzzz_unlike", 1, "zzzz_unlike: 3", "unknown", None, "", False)]),
        (AXOLOTL + "_mine: 1\nx-mine: 1\n.mine: 1\nzzzz:\n", []),
        (AXOLOTL + "zzzz_unlike: []\n", [("zzzz_unlike", 3, "zzzz_unlike: []", "unknown", None, "", False)]),
        (AXOLOTL + "zzzz_unlike: {}\n", [("zzzz_unlike", 3, "zzzz_unlike: {}", "unknown", None, "", False)]),
        (AXOLOTL + "zzzz_unlike: ''\n", []),
        (AXOLOTL + "zzzz_unlike: {a: 1}\n",
         [("zzzz_unlike", 3, "zzzz_unlike: {a: 1}", "block", None, "", False)]),
        (TRL + "group_by_length: true\n",
         [("group_by_length", 4, "group_by_length: true", "removed", None, "transformers 5.15", False)]),
        (TRL + "torch_dtype: x\n", [("torch_dtype", 4, "torch_dtype: x", "renamed", "dtype", "", False)]),
        (TRL + "accelerate_config: x\n", []),
        (AXOLOTL + "accelerate_config: x\nplugins: ours\n", []),
        (AXOLOTL + "plugins:\nzzzz_unlike: 1\n",
         [("zzzz_unlike", 4, "zzzz_unlike: 1", "unknown", None, "", False)]),
        (OWN + "lora_targets_modules: x\n",
         [("lora_targets_modules", 4, "lora_targets_modules: x", "unknown", "lora_target_modules", "", False)]),
        (OWN + "lora_targets_modules: x\nlora_target_modules: y\n", []),
        (OWN + "learning_rate: 1\nmy_rate: 2\n", []),
        (OWN + "use_lora: true\n", []),
        (SWIFT + "trainable_parameters: [a]\nfreeze_parameters: []\n",
         [("trainable_parameters", 4, "trainable_parameters: [a]", "dropped", None, "under tuner_type: full alone",
           False)]),
        (FACTORY + "new_special_tokens: <a>\n",
         [("new_special_tokens", 4, "new_special_tokens: <a>", "renamed", "add_special_tokens", "", True)]),
        (TRL + "reward_funcs: [accuracy_reward]\nreward_model_name_or_path: a/b\n", []),
    ],
)  # fmt: skip
def test_keys_that_nothing_reads(text: str, keys_told: list[tuple[Any, ...]]) -> None:
    assert unknown(text) == [UnknownKey(*one) for one in keys_told]


ON_TRL = TRL + "lora_r: 4\nlora_alpha: 8\nlearning_rate: 1.0e-4\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (ON_TRL, "TRL"),
        (ON_TRL + "a_: 1\nb_: 1\nc_: 1\ntorch_dtype: x\nblock: {a: 1}\n", "TRL"),
        (ON_TRL + "a_: 1\nb_: 1\nc_: 1\nd_: 1\n", "your own script"),
        (ON_TRL + "system_prompt: You think.\n", "your own script"),
        (TRL + "a_: 1\nb_: 1\nc_: 1\nd_: 1\n", "TRL"),
    ],
)
def test_scripts_that_read_more_than_trl(text: str, name: str) -> None:
    found = recognised(read_yaml(text.encode()))
    assert found is not None
    assert name == found[0].NAME


def wrong(text: str) -> list[WrongKind]:
    file = read_yaml(text.encode())
    found = recognised(file)
    assert found is not None
    return list(wrong_kinds(file, found[0]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (OWN + "lr: 1e-4\nmodel: {_target_: a.B}\n", []),
        (OWN + "lr: 1e-4\nmodel: [{_component_: a.B}]\n", []),
        (OWN + "optimizer: {class_path: a.B, lr: 1e-4}\n", []),
        (OWN + "lr: 1e4\n", [("lr", 4, "1e4", "10000", True)]),
        (OWN + "lr: 1E-4\n", [("lr", 4, "1E-4", "1.0e-4", True)]),
        (OWN + "lr: 1.5e4\n", [("lr", 4, "1.5e4", "15000", True)]),
        (OWN + "lr: 1.5e-4\nseed: 1e-4\n", []),
        (OWN + "lr: '3'\nwarmup_steps: ''\nseed: '3'\n", [("lr", 4, "3", "3", True)]),
        (AXOLOTL + "learning_rate: '3'\nlora_alpha: 1e4\n", []),
        (AXOLOTL + "learning_rate: 0,1\nseed: 0,1\n", [("learning_rate", 3, "0,1", "0.1", True)]),
        (AXOLOTL + "learning_rate: [0, 1]\n", []),
        (AXOLOTL + "eval_strategy: no\n", [("eval_strategy", 3, "no", '"no"', False)]),
        (TRL + "eval_strategy: Off\n", [("eval_strategy", 4, "Off", '"Off"', True)]),
        (TRL + "eval_strategy: 'no'\nsave_strategy: false\nbf16: no\nreport_to: wandb\n", []),
        (TRL + "dataset: [a, ~/b,\n  ~/c]\n",
         [("dataset", 4, "~/b", "/home/USER/b", True), ("dataset", 5, "~/c", "/home/USER/c", True)]),
        (TRL + "output_dir: ~/a\ndataset_dir: a~\nmodel: ~\n", []),
        (OWN + "one: &x\n  lr: 1e4\ntwo: *x\n", [("lr", 5, "1e4", "10000", True)]),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(text: str, told: list[tuple[Any, ...]]) -> None:
    assert [(one.key, one.line, one.written, one.mended, one.stops) for one in wrong(text)] == told


def test_what_is_found_in_the_tree_of_a_recipe(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        for name in ("ab", "abc"):
            (folder / name).write_text(name)
    tree = Tree(inside)
    assert tree.find("ab") == inside / "ab"
    for name in ("", 3, None, "nowhere", "a\0b", "../out/ab", str(inside / "ab")):
        assert tree.find(name) is None
        assert tree.read(name) is None
    assert tree.find("./" * 499 + "ab") is not None  # a thousand letters
    assert tree.find("./" * 499 + "abc") is None
    assert tree.adapter("ab") is None
    assert (tree.mapping("ab"), tree.mapping("nowhere")) == ({}, {})
    (inside / "a.yaml").write_text("a: 1\n")
    (inside / "a.json").write_text('{"a": 2}')
    assert (tree.mapping("a.yaml"), tree.mapping("a.json")) == ({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        ({"num_hidden_layers": 2, "hidden_size": 100_001, "vocab_size": 200_000}, True),
        ({"num_hidden_layers": 100_000}, True),
        ({"num_hidden_layers": 1_000, "num_experts": 101}, False),
        ({"layer_types": ["a"] * 400, "num_experts": 300}, False),
        ({"num_hidden_layers": 1_000, "architectures": ["a"] * 101, "other": 101}, True),
        ({"text_config": {"num_hidden_layers": 1_001, "num_local_experts": 100}}, False),
        ({"parts": ["x", {"num_layers": 100_001}]}, False),
    ],
)
def test_a_model_folder_that_would_take_long_is_left(
    tmp_path: Path, config: dict[str, Any], taken: bool
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert (Tree(tmp_path).base("model") is not None) is taken


def test_what_a_saved_adapter_says_of_itself(tmp_path: Path) -> None:
    def adapter(**config: Any) -> tuple[Any, ...]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found = Tree(tmp_path).adapter(".")
        assert found is not None
        return found.r, found.alpha, found.targets, found.saved, found.use_rslora, found.use_dora, found.kind

    full = {"r": 4, "lora_alpha": 0.5, "target_modules": ["v", "q"], "modules_to_save": ["head"]}
    assert adapter(**full, use_rslora=True, use_dora=False, peft_type="LORA") == (
        4, 0.5, ("q", "v"), ("head",), True, False, "LORA",
    )  # fmt: skip
    assert adapter(r=4.0, lora_alpha="8", target_modules=["v", 3], use_rslora=1) == (
        None, None, None, (), None, None, None,
    )  # fmt: skip
    assert adapter(target_modules="q|v")[2] == "q|v"


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "zero3_offload"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "zero3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "zero2"),
        ({}, "zero1"),
    ],
)
def test_what_a_configuration_of_deepspeed_says_comes_before_its_name(
    tmp_path: Path, config: dict[str, Any], strategy: str
) -> None:
    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": config}))
    assert deepspeed_strategy(Value("zero1.json", "line 1"), Tree(tmp_path)).value == strategy


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ({}, None),
        ({"fsdp_version": 1}, 1),
        ({"fsdp_version": "2"}, 2),
        ({"version": 2}, 2),
        ({"fsdp_version": 3}, None),
        ({"fsdp_config": {"version": 2}}, 2),
        ({"fsdp_version": 1, "fsdp_config": {"fsdp_version": 2}}, 1),
        ({"fsdp_config": "fsdp2.json"}, None),
        ({"fsdp": "FSDP2"}, 2),
        ({"fsdp": "full_shard"}, None),
    ],
)
def test_the_version_that_arguments_of_fsdp_say(said: dict[str, Any], version: int | None) -> None:
    assert fsdp_version(said) == version


@pytest.mark.parametrize(
    ("text", "strategy", "key"),
    [
        ("fsdp: full_shard\nfsdp_version: 1\n", "fsdp1", "fsdp"),
        ("fsdp_version: 2\n", "fsdp2", "fsdp_version"),
        ("fsdp: [full_shard, offload]\nfsdp_version: 1\n", "fsdp1_offload", "fsdp"),
        ("fsdp_config: {fsdp_version: 2, offload_params: false}\n", "fsdp2", "fsdp_config"),
        ("fsdp_config: {fsdp_version: 2, offload_params: 'yes'}\n", "fsdp2_offload", "fsdp_config"),
        ("fsdp_config: {fsdp_version: 2, reshard_after_forward: true}\n", "fsdp2", "fsdp_config"),
        ("fsdp_config: f.json\n", "fsdp2_offload", "fsdp_config"),
        ("fsdp_config: nowhere.json\nfsdp_version: 2\n", "fsdp2", "fsdp_config"),
        ("other: 1\n", None, None),
    ],
)
def test_how_a_recipe_says_fsdp(tmp_path: Path, text: str, strategy: str | None, key: str | None) -> None:
    (tmp_path / "f.json").write_text('{"version": 2, "cpu_offload": 1}')
    found = fsdp_strategy(keys(text), "fsdp", "fsdp_config", "fsdp_version", tree=Tree(tmp_path))
    assert (found.value if found else None, found.key if found else None) == (strategy, key)
    assert fsdp_strategy(keys("fsdp: full_shard\n"), "fsdp", version=2) == Value("fsdp2", "line 1", "fsdp", 1)


@pytest.mark.parametrize("before", ["true", None])
def test_asking_for_the_version_leaves_the_environment(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    fsdp_version_of_arguments.cache_clear()
    assert fsdp_version_of_arguments() in (1, 2)
    assert os.environ.get(name) == before
