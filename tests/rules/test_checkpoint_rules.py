"""Rules on saved adapters, beyond the examples of their documentation."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pytest_lora import Expect, Report, check_checkpoint
from pytest_lora.bases import examples
from pytest_lora.bases.examples import folders
from pytest_lora.bases.examples.folders import configure, edit
from pytest_lora.bases.examples.models import BASES, quantized
from pytest_lora.inspection.checkpoint import checkpoint_facts
from pytest_lora.inspection.checkpoint.fit import Base
from pytest_lora.rules import judge
from tests.namespace import Namespace

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def names(tmp_path: Path) -> Namespace:
    return Namespace(tmp_path)


def loud(report: Report) -> list[str]:
    return [finding.code for finding in (*report.errors, *report.warnings)]


def both(path: Path, base: Any, **expect: Any) -> list[list[str]]:
    """What is said without a base, and with it."""
    meant = Expect(**expect)
    return [loud(check_checkpoint(path, expect=meant)), loud(check_checkpoint(path, base, expect=meant))]


HEALTHY: dict[str, dict[str, Any]] = {
    "plain": {},
    "every linear layer": {"target_modules": ALL_LINEAR},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "rank and alpha patterns": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding and head": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "token rows": {"trainable_token_indices": [126, 127]},
    "token rows by name": {"trainable_token_indices": {"embed_tokens": [126, 127]}},
    "bias": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "fused names": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "high rank": {"r": 64, "lora_alpha": 16},
    "no task type": {"task_type": None},
}


@pytest.mark.parametrize("case", HEALTHY)
def test_sound_adapters_pass_with_and_without_a_base(names: Namespace, case: str) -> None:
    path = names.adapter(**HEALTHY[case])
    assert both(path, names["base"]) == [[], []]


@pytest.mark.skipif(
    "ensure_weight_tying" not in LoraConfig.__dataclass_fields__, reason="this PEFT does not tie adapters"
)
def test_a_head_that_is_adapted_with_its_embedding_is_sound(names: Namespace) -> None:
    path = names.adapter(
        on=names["tied_base"], target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    )
    assert both(path, BASES["tied_base"]()) == [[], []]
    configure(path, ensure_weight_tying=False)
    assert "LORA425" in both(path, BASES["tied_base"]())[0]


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ("gpt2_base", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("tied_base", {"target_modules": ALL_LINEAR}),
        ("classifier_base", {"task_type": "SEQ_CLS"}),
        ("moe_base", {}),
        ("vision_language_base", {"task_type": None, "target_modules": r"language_model\..*"}),
        ("batchnorm_base", {"task_type": None, "target_modules": ["conv"], "modules_to_save": ["head"]}),
        ("fused_moe_base", {"task_type": None, "target_modules": [], "target_parameters": ["experts.up"]}),
    ],
)
def test_sound_adapters_of_other_bases_pass(names: Namespace, base: str, fields: dict[str, Any]) -> None:
    path = names.adapter(on=names[base], **fields)
    assert both(path, BASES[base]()) == [[], []]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_dtype_is_sound(names: Namespace, dtype: torch.dtype) -> None:
    path = edit(names.adapter(), lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    assert both(path, names["base"]) == [[], []]


def test_a_quantized_base_and_a_config_file_serve_as_bases(names: Namespace, tmp_path: Path) -> None:
    path, base = names.adapter(), names["base"]
    file = tmp_path / "model"
    base.save_pretrained(file)
    assert loud(check_checkpoint(path, quantized(BASES["base"]()))) == []
    assert loud(check_checkpoint(path, file)) == []
    assert loud(check_checkpoint(path, str(file / "config.json"))) == []
    assert loud(check_checkpoint(path, base.config)) == []


def with_quantized_head() -> Any:
    model: Any = quantized(BASES["base"]())
    held = nn.Sequential(model.lm_head)
    model.lm_head = quantized(held)[0]
    return model


def test_a_quantized_head_that_is_adapted_fits_its_base_and_no_other(tmp_path: Path) -> None:
    """PEFT writes the packed weight of an adapted head beside the adapter; its bytes are no rows."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(with_quantized_head(), config)
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.save_pretrained(tmp_path)
    assert "lm_head.base_layer.weight.absmax" in str(load_file(tmp_path / "adapter_model.safetensors").keys())
    PeftModel.from_pretrained(with_quantized_head(), tmp_path)
    assert loud(check_checkpoint(tmp_path, with_quantized_head())) == []
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(BASES["base"](), tmp_path)
    assert loud(check_checkpoint(tmp_path, BASES["base"]())) == ["LORA425"]


def test_what_a_trainer_leaves_beside_the_adapter_is_mentioned_only(names: Namespace) -> None:
    path = names.adapter()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({}, path / name)
    for name in ("trainer_state.json", "tokenizer_config.json", "README.md"):
        (path / name).write_text("{}")
    report = check_checkpoint(path, names["base"])
    assert (loud(report), [f.code for f in report.infos]) == ([], ["LORA403"])
    assert report.infos[0].observed == "4 pickles lie beside the adapter, not opened"


def test_an_adapter_of_an_older_transformers_loads_where_peft_converts_it(names: Namespace) -> None:
    """PEFT has the last word: it maps the names of experts that transformers has since fused."""
    base = BASES["moe_base"]()
    path = names.adapter(on=BASES["moe_base"]())
    assert loud(check_checkpoint(path, base)) == []


def test_the_name_default_in_the_keys_is_told_where_peft_drops_them(names: Namespace) -> None:
    """PEFT 0.17 drops such keys, later ones find them; without a base nobody is asked."""
    path = edit(names.adapter(), lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    served = PeftModel.from_pretrained(BASES["base"](), path)
    found = any(bool(p.any()) for name, p in served.named_parameters() if "lora_B" in name)
    assert both(path, names["base"]) == [[], [] if found else ["LORA422"]]
    edit(
        path, lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}
    )  # what else is wrong is told alone
    assert both(path, names["base"])[1] == ["LORA424"]


def test_a_resized_vocabulary_that_peft_saved_is_sound_on_a_resized_base(names: Namespace) -> None:
    path = names.adapter()
    edit(path, lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.randn(130, 64)})
    report = check_checkpoint(path, names["base"])
    (finding,) = report.errors
    assert finding.code == "LORA434"
    assert finding.observed == (
        "the file has 130 rows for 'embed_tokens', but the vocabulary of LlamaForCausalLM has 128"
    )
    assert finding.fix == "call base.resize_token_embeddings(130) before the adapter is loaded"
    names["base"].resize_token_embeddings(130)
    assert both(path, names["base"]) == [[], []]


def rename_keys(change: Callable[[str], str]) -> Callable[[Path], Path]:
    return lambda path: edit(path, lambda t: {change(k): v for k, v in t.items()})


def change_values(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], Path]:
    return lambda path: edit(path, lambda t: {k: change(k, v) for k, v in t.items()})


def keep(wanted: Callable[[str], bool]) -> Callable[[Path], Path]:
    return lambda path: edit(path, lambda t: {k: v for k, v in t.items() if wanted(k)})


def cast(dtype: torch.dtype) -> Callable[[Path], Path]:
    return change_values(lambda k, v: v.to(dtype))


DAMAGE: dict[str, tuple[dict[str, Any], Callable[[Path], Any], list[str], list[str]]] = {
    "no prefix": ({}, rename_keys(lambda k: k.removeprefix("base_model.model.")), ["LORA422"], ["LORA422"]),
    "prefix twice": ({}, rename_keys(lambda k: f"base_model.model.{k}"), ["LORA422"], ["LORA422"]),
    "DDP": ({}, rename_keys(lambda k: f"module.{k}"), ["LORA422"], ["LORA422"]),
    "DDP inside": (
        {},
        rename_keys(lambda k: k.replace("base_model.model.", "base_model.model.module.")),
        ["LORA422"],
        ["LORA422"],
    ),
    "torch.compile": ({}, rename_keys(lambda k: f"_orig_mod.{k}"), ["LORA422"], ["LORA422"]),
    "torch.compile inside": (
        {},
        rename_keys(lambda k: k.replace("base_model.model.", "base_model.model._orig_mod.")),
        ["LORA422"],
        ["LORA422"],
    ),
    "FSDP": (
        {},
        rename_keys(lambda k: k.replace(".self_attn", "._fsdp_wrapped_module.self_attn")),
        ["LORA422"],
        ["LORA422"],
    ),
    "adapter name": (
        {},
        rename_keys(lambda k: k.replace(".weight", ".math.weight")),
        ["LORA422"],
        ["LORA422"],
    ),
    "Lightning": ({}, rename_keys(lambda k: f"model.{k}"), ["LORA422"], ["LORA422"]),
    "a value head": ({}, rename_keys(lambda k: f"pretrained_model.{k}"), ["LORA422"], ["LORA422"]),
    "diffusers": (
        {},
        rename_keys(lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up")),
        ["LORA422"],
        ["LORA422"],
    ),
    "MLX": (
        {},
        rename_keys(lambda k: k.removeprefix("base_model.model.").removesuffix(".weight").lower()),
        ["LORA422"],
        ["LORA422"],
    ),
    "no .weight": ({}, rename_keys(lambda k: k.removesuffix(".weight")), ["LORA422"], ["LORA422"]),
    "no lora_A": ({}, keep(lambda k: "lora_A" not in k), ["LORA423"], ["LORA423"]),
    "half of lora_B": (
        {},
        keep(lambda k: not ("lora_B" in k and "layers.1." in k)),
        ["LORA423"],
        ["LORA423"],
    ),
    "no magnitude": ({"use_dora": True}, keep(lambda k: "magnitude" not in k), ["LORA423"], ["LORA423"]),
    "use_dora lost": ({"use_dora": True}, lambda p: configure(p, use_dora=False), ["LORA425"], ["LORA425"]),
    "a layer lost": ({}, keep(lambda k: "layers.1." not in k), [], ["LORA424"]),
    "targets lost": (
        {},
        lambda p: configure(p, target_modules=["q_proj"]),
        ["LORA425"],
        ["LORA425"],
    ),
    "targets added": (
        {},
        lambda p: configure(p, target_modules=["q_proj", "v_proj", "o_proj"]),
        [],
        ["LORA424"],
    ),
    "rank pattern lost": (
        {"rank_pattern": {"v_proj": 4}},
        lambda p: configure(p, rank_pattern={}),
        ["LORA431"],
        ["LORA431"],
    ),
    "rank above the config's": ({}, lambda p: configure(p, r=4), ["LORA431"], ["LORA431"]),
    "empty tensors": ({}, change_values(lambda k, v: v[:0]), ["LORA432"], ["LORA432"]),
    "an empty head": (
        {"modules_to_save": ["lm_head"]},
        change_values(lambda k, v: v[:0] if "lm_head" in k else v),
        ["LORA432"],
        ["LORA432"],
    ),
    "an empty embedding": (
        {"modules_to_save": ["embed_tokens"]},
        change_values(lambda k, v: torch.empty(0) if "embed_tokens" in k else v),
        ["LORA432"],
        ["LORA432"],
    ),
    "more token rows than the config's": (
        {"trainable_token_indices": [125, 126, 127]},
        lambda p: configure(p, trainable_token_indices=[126, 127]),
        [],
        ["LORA433"],
    ),
    "flat tensors": ({}, change_values(lambda k, v: v.reshape(-1)), ["LORA432"], ["LORA432"]),
    "transposed": (
        {},
        change_values(lambda k, v: v.T if "lora_A" in k else v),
        ["LORA431"],
        ["LORA431"],
    ),
    "both transposed": ({}, change_values(lambda k, v: v.T), ["LORA431"], ["LORA431"]),
    "A and B exchanged": (
        {},
        rename_keys(lambda k: k.replace("lora_A", "C").replace("lora_B", "lora_A").replace("C", "lora_B")),
        ["LORA431"],
        ["LORA431"],
    ),
    "whole numbers": ({}, cast(torch.int8), ["LORA435"], ["LORA435"]),
    "zero B": (
        {},
        change_values(lambda k, v: v * 0 if "lora_B" in k else v),
        ["LORA442"],
        ["LORA442"],
    ),
    "zero A": (
        {},
        change_values(lambda k, v: v * 0 if "lora_A" in k else v),
        ["LORA442"],
        ["LORA442"],
    ),
    "one layer zero": (
        {},
        change_values(lambda k, v: v * 0 if "lora_B" in k and "layers.1." in k else v),
        ["LORA442"],
        ["LORA442"],
    ),
    "infinite": (
        {},
        change_values(lambda k, v: v + float("inf") if "layers.0." in k else v),
        ["LORA441"],
        ["LORA441"],
    ),
    "head lost": (
        {"modules_to_save": ["lm_head"]},
        keep(lambda k: "lora_" in k),
        ["LORA426"],
        ["LORA426"],
    ),
    "token rows lost": (
        {"trainable_token_indices": [126, 127]},
        keep(lambda k: "lora_" in k),
        ["LORA426"],
        ["LORA426"],
    ),
    "alpha of zero": ({}, lambda p: configure(p, lora_alpha=0), ["LORA101"], ["LORA101"]),
    "a negative alpha": ({}, lambda p: configure(p, lora_alpha=-16), ["LORA101"], ["LORA101"]),
    "an alpha of another rank": ({}, lambda p: configure(p, lora_alpha=1024), ["LORA103"], ["LORA103"]),
    "scaling applied to the file": (
        {},
        change_values(lambda k, v: v * 1e4 if "lora_B" in k else v),
        ["LORA444"],
        ["LORA444"],
    ),
    "one target zero": (
        {"target_modules": ALL_LINEAR},
        change_values(lambda k, v: v * 0 if "v_proj.lora_B" in k else v),
        ["LORA442"],
        ["LORA442"],
    ),
    "a head of zeros": (
        {"modules_to_save": ["lm_head"]},
        change_values(lambda k, v: v * 0 if "lm_head" in k else v),
        ["LORA442"],
        ["LORA442"],
    ),
    "a magnitude of zero": (
        {"use_dora": True},
        change_values(lambda k, v: v * 0 if "magnitude" in k else v),
        ["LORA442"],
        ["LORA442"],
    ),
    "no alpha": ({}, lambda p: configure(p, lora_alpha=None), ["LORA414"], ["LORA414"]),
    "PiSSA": ({}, lambda p: configure(p, init_lora_weights="pissa_niter_4"), ["LORA443"], ["LORA443"]),
    "rank of zero": ({}, lambda p: configure(p, r=0), ["LORA413"], ["LORA413"]),
    "rank as text": ({}, lambda p: configure(p, r="8"), ["LORA413"], ["LORA413"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_once(names: Namespace, case: str) -> None:
    fields, damage, without, with_base = DAMAGE[case]
    path = names.adapter(**fields)
    damage(path)
    assert both(path, names["base"]) == [without, with_base]


@pytest.mark.parametrize(
    ("change", "seen", "wanted"),
    [
        (
            lambda k: f"model.{k}",
            "carry 'model.' before the prefix base_model.model.",
            "take 'model.' off the keys: save_file({k.replace('model.', '', 1): v for k, v in "
            "load(file.read_bytes()).items()}, file); save_pretrained of the PeftModel itself next time",
        ),
        (
            lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
            "are named as diffusers or kohya-ss name them (lora_down, lora_up)",
            "convert the file: lora_down is lora_A, lora_up is lora_B, and the modules need the names of this base",
        ),
        (
            lambda k: k.removesuffix(".weight").replace("lora_A", "lora_a").replace("lora_B", "lora_b"),
            "are named as MLX names them (lora_a, lora_b)",
            "convert the file: lora_a is lora_A.weight and lora_b is lora_B.weight, each transposed; its scale is the "
            "whole scaling, so lora_alpha is scale * r",
        ),
    ],
)
def test_keys_of_other_tools_are_told_by_their_origin(
    names: Namespace, change: Callable[[str], str], seen: str, wanted: str
) -> None:
    path = names.adapter()
    rename_keys(change)(path)
    (finding,) = check_checkpoint(path, names["base"]).errors
    assert (finding.code, seen in finding.observed, finding.fix) == ("LORA422", True, wanted)
    assert finding.expected == "keys such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 136\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html><body>401</body></html>", "an HTML page"),
        (b"PK\x03\x04 and so on, as torch.save begins", "a pickle"),
        (b"GGUF and some more bytes after it", "a GGUF file"),
    ],
)
def test_another_file_under_the_name_of_the_weights(names: Namespace, content: bytes, seen: str) -> None:
    path = names.adapter()
    (path / "adapter_model.safetensors").write_bytes(content)
    (finding,) = check_checkpoint(path).errors
    assert finding.code == "LORA401"
    assert seen in finding.observed


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 136\n", "a pointer of Git LFS"),
        (
            '{"r": 8,\n<<<<<<< HEAD\n"lora_alpha": 8\n=======\n"lora_alpha": 16\n>>>>>>> b\n}',
            "merge conflict",
        ),
        ("", "it is empty"),
    ],
)
def test_another_text_under_the_name_of_the_configuration(names: Namespace, content: str, seen: str) -> None:
    path = folders.write(names.adapter(), "adapter_config.json", content)
    (finding,) = check_checkpoint(path).errors
    assert finding.code == "LORA412"
    assert seen in finding.observed


def test_fresh_adapters_are_meant_where_it_is_said(names: Namespace) -> None:
    path = edit(names.adapter(), lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    assert both(path, names["base"], fresh=True) == [[], []]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"hidden_size": 128}, "LORA433"),
        ({"num_hidden_layers": 4}, "LORA425"),
        ({"num_hidden_layers": 1}, "LORA424"),
    ],
)
def test_adapters_of_a_base_of_another_size(names: Namespace, changes: dict[str, int], code: str) -> None:
    assert loud(check_checkpoint(names.adapter(**changes), names["base"])) == [code]


def test_shapes_of_another_base_are_told_once(names: Namespace) -> None:
    (finding,) = check_checkpoint(names.adapter(hidden_size=128), names["base"]).errors
    assert finding.observed == (
        "model.layers.0.self_attn.q_proj.lora_A.weight is 8x128, but LlamaForCausalLM asks for 8x64 "
        "(8 of 8 tensors do not fit)"
    )


def test_a_head_with_other_classes(names: Namespace) -> None:
    path = names.adapter(on=names["classifier_base"], task_type="SEQ_CLS")
    edit(path, lambda t: {k: torch.randn(8, 64) if "score" in k else v for k, v in t.items()})
    report = check_checkpoint(path, BASES["classifier_base"]())
    (finding,) = report.errors
    assert (finding.code, finding.fix) == ("LORA433", "load the base with num_labels=8, as in training")


def test_a_tokenizer_with_more_tokens_than_rows(names: Namespace) -> None:
    path = folders.write(names.adapter(), "added_tokens.json", json.dumps({"<a>": 128, "<b>": 129}))
    (finding,) = check_checkpoint(path, names["base"]).errors
    assert (finding.code, finding.observed) == (
        "LORA434",
        "the tokenizer knows token 129, but the vocabulary of LlamaForCausalLM has only 128 rows, and the file adds "
        "none",
    )
    for extended in (False, True):
        facts = checkpoint_facts(path, Base(names["base"], may_be_extended=extended))
        assert [found.code for found in judge([facts], Expect())] == ([] if extended else ["LORA434"])


@pytest.mark.parametrize(
    ("named", "given", "loudly"),
    [
        ("org/tiny-llama", "org/tiny-llama", []),
        ("org/tiny-llama", "other/tiny-llama", []),
        ("org/tiny-llama", "/data/models/tiny-llama", []),
        ("org/Tiny-Llama", "unsloth/tiny-llama-bnb-4bit", []),
        ("unsloth/tiny-llama-unsloth-bnb-4bit", "org/tiny-llama", []),
        ("org/tiny-llama", "/home/me/output/checkpoint-500", []),
        ("/mnt/a/tiny-llama-v2", "org/tiny-llama", []),
        ("/root/.cache/huggingface/hub/models--org--tiny-llama/snapshots/abc", "org/tiny-llama", []),
        ("org/tiny-llama", "org/tiny-llama-instruct", ["LORA453"]),
        ("org/tiny-llama-v0.1", "org/tiny-llama-v0.3", ["LORA453"]),
        ("org/tiny-llama", "org/tiny-mistral", ["LORA453"]),
    ],
)
def test_names_of_bases(names: Namespace, named: str, given: str, loudly: list[str]) -> None:
    path = configure(names.adapter(), base_model_name_or_path=named)
    names["base"].name_or_path = given
    assert loud(check_checkpoint(path, names["base"])) == loudly


def test_biases_that_were_trained_and_lost(names: Namespace) -> None:
    fields = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}
    path = names.adapter(on=names["gpt2_base"], **fields)
    if not any(key.endswith("bias") for key in load_file(path / "adapter_model.safetensors")):
        pytest.skip("this version of PEFT neither saves nor loads them")
    assert both(path, BASES["gpt2_base"]()) == [[], []]
    edit(path, lambda t: {k: v for k, v in t.items() if "lora_" in k})
    (finding,) = check_checkpoint(path, BASES["gpt2_base"]()).errors
    assert (finding.code, finding.observed) == (
        "LORA426",
        "bias='lora_only' asks for it, but it is missing: the file has no weights of it",
    )


def test_keys_under_another_path_of_the_same_model(names: Namespace) -> None:
    path = edit(
        names.adapter(),
        lambda t: {k.replace("model.layers", "model.language_model.layers"): v for k, v in t.items()},
    )
    (finding,) = check_checkpoint(path, names["base"]).errors
    assert finding.code == "LORA451"
    assert finding.fix == (
        "the base calls it 'model.layers.0.self_attn.q_proj': if this is the same model, rename the keys; "
        "else load it on 'org/tiny-llama', which its configuration names"
    )


def test_keys_of_the_language_model_alone(names: Namespace) -> None:
    """Of two towers that have a block of that number, the one of the same sizes is named."""
    (finding,) = check_checkpoint(names.adapter(), BASES["image_text_base"]()).errors
    assert finding.code == "LORA451"
    assert finding.fix.startswith("the base calls it 'model.language_model.layers.0.self_attn.q_proj'")


def test_the_folder_above_a_named_adapter(names: Namespace, tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    names.adapter().rename(tmp_path / "above" / "math")
    (finding,) = check_checkpoint(tmp_path / "above").errors
    assert (finding.code, finding.fix) == (
        "LORA411",
        "adapters with names of their own lie in folders of their own: point to math",
    )


def test_a_nested_peft_model_is_recognised_by_its_keys(names: Namespace, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = get_peft_model(get_peft_model(names["base"], config), config)
        for name, parameter in nested.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        nested.save_pretrained(tmp_path / "nested")
    report = check_checkpoint(tmp_path / "nested", BASES["base"]())
    assert "LORA422" in loud(report) or "LORA425" in loud(report)


@pytest.mark.parametrize("method", ["LOHA", "IA3", "PROMPT_TUNING", "ADALORA", "SOMETHING_NEW"])
def test_other_methods_are_named_and_not_judged(names: Namespace, method: str) -> None:
    path = configure(names.adapter(), peft_type=method, r=99)
    rename_keys(lambda k: k.replace("lora_A", "hada_w1_a") if method != "ADALORA" else k)(path)
    report = check_checkpoint(path, names["base"])
    (finding,) = report.findings
    assert (finding.severity, finding.code) == ("info", "LORA415")
    assert finding.observed == f"peft_type {method}: keys and shapes were not judged"


@pytest.mark.parametrize("method", ["LOHA", "IA3", "QLORA"])
def test_factors_of_lora_under_the_name_of_another_method(names: Namespace, method: str) -> None:
    path = configure(names.adapter(), peft_type=method)
    assert both(path, names["base"]) == [["LORA415"], ["LORA415"]]
    assert "all 8 tensors are lora_A and lora_B" in check_checkpoint(path).warnings[0].observed


@pytest.mark.parametrize(
    "key",
    [
        "unet.down_blocks.0.attentions.0.to_q.lora_A.weight",
        "unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    ],
)
def test_files_of_diffusers_are_named_and_not_judged(tmp_path: Path, key: str) -> None:
    from safetensors.torch import save_file

    save_file({key: torch.randn(4, 8)}, tmp_path / "pytorch_lora_weights.safetensors")
    report = check_checkpoint(tmp_path)
    assert [(f.severity, f.code) for f in report.findings] == [("info", "LORA415")]
    assert (
        f"an adapter of {'kohya-ss' if key.startswith('lora_') else 'diffusers'}"
        in report.findings[0].observed
    )


def test_values_of_other_methods_are_looked_at(names: Namespace) -> None:
    path = configure(names.adapter(), peft_type="ADALORA")
    edit(path, lambda t: {k: v * float("nan") for k, v in t.items()})
    assert loud(check_checkpoint(path)) == ["LORA441"]


def test_a_pickle_is_read_on_request(names: Namespace) -> None:
    path = folders.pickle_weights(names.adapter())
    assert loud(check_checkpoint(path, names["base"])) == ["LORA403"]
    assert check_checkpoint(path, names["base"], expect=Expect(read_pickle=True)).findings == ()
    configure(path, r=16)
    assert loud(check_checkpoint(path, names["base"], expect=Expect(read_pickle=True))) == ["LORA431"]


def test_new_tokens_that_nobody_trained(names: Namespace) -> None:
    report = check_checkpoint(names.adapter(), names["base"], expect=Expect(new_tokens=2))
    assert set(loud(report)) == {"LORA119"}
    saved = {"base_model.model.model.embed_tokens.weight": torch.randn(128, 64)}
    path = edit(names.adapter(), lambda t: {**t, **saved})
    assert loud(check_checkpoint(path, names["base"], expect=Expect(new_tokens=2))) == []


def test_the_configuration_that_was_meant_is_compared(names: Namespace) -> None:
    meant = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_rslora=True)
    assert both(names.adapter(), names["base"], config=meant) == [["LORA126"], ["LORA126"]]
    meant = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    assert both(names.adapter(), names["base"], config=meant) == [[], []]


def test_the_scaling_and_the_scope_that_were_meant_are_compared_without_a_base_too(names: Namespace) -> None:
    assert both(names.adapter(), names["base"], alpha_ratio=1.0) == [["LORA127"], ["LORA127"]]
    assert both(names.adapter(), names["base"], alpha_ratio=2.0, scope="self_attn") == [[], []]
    assert both(names.adapter(), names["base"], scope="mlp") == [["LORA114"], ["LORA114"]]


def test_a_tied_head_is_told_where_it_is_going_to_be_merged(names: Namespace) -> None:
    path = names.adapter(on=BASES["tied_base"](), target_modules=["q_proj", "lm_head"])
    assert loud(check_checkpoint(path, BASES["tied_base"]())) == []
    meant = Expect(will_merge=True)
    assert loud(check_checkpoint(path, BASES["tied_base"](), expect=meant)) == ["LORA113"]


@pytest.mark.parametrize(
    ("part", "severity"), [("model.vision_tower", "info"), ("model.experts", "info"), ("model", "warning")]
)
def test_parts_that_may_never_have_run_are_mentioned_only(names: Namespace, part: str, severity: str) -> None:
    path = names.adapter()
    change_values(lambda k, v: v * 0 if "layers.1." in k and "lora_B" in k else v)(path)
    rename_keys(lambda k: k.replace("model.layers", f"{part}.layers"))(path)
    assert [(f.severity, f.code) for f in check_checkpoint(path).findings] == [(severity, "LORA442")]


@pytest.mark.parametrize(
    ("name", "severity"), [("ref", "info"), ("reference", "info"), ("second", "error"), ("prefs", "error")]
)
def test_the_reference_that_a_preference_trainer_saves_beside_its_adapter(
    names: Namespace, name: str, severity: str
) -> None:
    trained = names.adapter()
    empty = trained / name
    shutil.copytree(trained, empty)
    change_values(lambda k, v: v * 0 if "lora_B" in k else v)(empty)
    assert [(f.severity, f.code) for f in check_checkpoint(empty).findings] == [(severity, "LORA442")]
    assert not check_checkpoint(trained).findings
    (trained / "adapter_config.json").unlink()  # no adapter around it any more
    assert [f.severity for f in check_checkpoint(empty).findings] == ["error"]


def test_an_adapter_that_names_itself_as_its_base(names: Namespace) -> None:
    path = names.adapter()
    configure(path, base_model_name_or_path=str(path))
    assert both(path, names["base"]) == [["LORA452"], ["LORA452"]]
    configure(path, base_model_name_or_path=str(path.parent))
    assert both(path, names["base"]) == [[], []]


def test_two_files_of_weights_that_cannot_hold_the_same(names: Namespace) -> None:
    path = names.adapter()
    tensors = {k: v.clone() for k, v in load_file(path / "adapter_model.safetensors").items()}
    torch.save(tensors, path / "adapter_model.bin")
    assert both(path, names["base"]) == [[], []]
    torch.save({k: torch.cat([v, v]) for k, v in tensors.items()}, path / "adapter_model.bin")
    assert both(path, names["base"]) == [["LORA403"], ["LORA403"]]


def test_two_files_of_weights_with_other_numbers(names: Namespace) -> None:
    """The bytes tell, in whatever order and under whatever names they lie; the pickle is not opened."""
    path = names.adapter()
    tensors = {k: v.clone() for k, v in load_file(path / "adapter_model.safetensors").items()}
    for same in (dict(reversed(tensors.items())), {f"module.{k}": v for k, v in tensors.items()}):
        torch.save(same, path / "adapter_model.bin")
        assert both(path, names["base"]) == [[], []]
    (path / "adapter_model.bin").write_bytes(b"?" * (path / "adapter_model.safetensors").stat().st_size)
    assert both(path, names["base"]) == [[], []]
    last = list(tensors)[-1]
    torch.save({**tensors, last: tensors[last] + 1e-3}, path / "adapter_model.bin")
    for report in (check_checkpoint(path), check_checkpoint(path, names["base"])):
        assert loud(report) == ["LORA403"]
        assert "the same sizes with other numbers, so one of the two is stale" in report.warnings[0].observed
    (path / "adapter_model.bin").unlink()  # as the fix says
    assert both(path, names["base"]) == [[], []]


def test_one_storage_for_two_tensors_is_not_compared(names: Namespace) -> None:
    path = names.adapter()
    tensors = load_file(path / "adapter_model.safetensors")
    shared = torch.cat([v.flatten() for v in tensors.values()])
    parts = shared.split([v.numel() for v in tensors.values()])
    torch.save(
        {k: p.view(v.shape) for (k, v), p in zip(tensors.items(), parts, strict=True)},
        path / "adapter_model.bin",
    )
    assert both(path, names["base"]) == [[], []]


def test_arguments_are_named(names: Namespace, tmp_path: Path) -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match="path must be a path, not 3"):
        check_checkpoint(wrong)
    with pytest.raises(ValueError, match="does not exist; adapters are never downloaded"):
        check_checkpoint(tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"base must be a torch\.nn\.Module"):
        check_checkpoint(names.adapter(), wrong)
    with pytest.raises(TypeError, match="expect must be an Expect, not 3"):
        check_checkpoint(names.adapter(), expect=wrong)
    with pytest.raises(ValueError, match="base: it carries adapters itself"):
        check_checkpoint(
            names.adapter(), get_peft_model(names["base"], LoraConfig(target_modules=["q_proj"]))
        )


def test_a_file_stands_for_its_folder(names: Namespace) -> None:
    path = configure(names.adapter(), r=16)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert loud(check_checkpoint(path / file)) == ["LORA431"]


@pytest.mark.parametrize("part", ["q_proj", "self_attn", "0"])
def test_an_adapter_that_is_called_as_its_modules_are_is_the_cause(tmp_path: Path, part: str) -> None:
    """Older PEFT takes ``.name`` out of all keys while it saves; the files are written as it writes them."""
    (tmp_path / "any").mkdir()
    saved = folders.edit(
        folders.save_adapter(tmp_path / "any", examples.base),
        lambda tensors: {name.replace(f".{part}", ""): values for name, values in tensors.items()},
    )
    path = saved.rename(saved.with_name(part))
    found = check_checkpoint(path, examples.base).errors
    assert found
    assert all(f"the adapter is called '{part}'" in finding.fix for finding in found)


def compiled_blocks() -> Any:
    base: Any = BASES["base"]()
    for index, layer in enumerate(base.model.layers):
        base.model.layers[index] = torch.compile(layer, backend="eager")
    return base


def compiled() -> Any:
    return torch.compile(BASES["base"](), backend="eager")


@pytest.mark.parametrize("wrap", [compiled_blocks, compiled])
def test_names_that_only_a_wrapper_keeps_apart_are_told(names: Namespace, wrap: Callable[[], Any]) -> None:
    """An adapter on a base whose live names are others, and its remedy."""
    path = names.adapter()
    report = check_checkpoint(path, wrap())
    assert loud(report) == ["LORA425"]
    assert "'_orig_mod.' of torch.compile in their names, and the keys have not" in str(report)
    assert "load the adapter first" in str(report)
    assert not loud(check_checkpoint(path, BASES["base"]()))


def zeroed(part: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    """An edit that sets a part of every ``lora_B`` to zero."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                part(tensor).zero_()
        return tensors

    return change


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda b: b[:, 4:], "4 of 8 ranks"),
        (lambda b: b[:, :6], "6 of 8 ranks"),
        (lambda b: b[len(b) // 2 :], "50 % of the rows"),
        (lambda b: b[: -len(b) // 4], "75 % of the rows"),
    ],
    ids=["last ranks", "first ranks", "second half", "all but a quarter"],
)
def test_the_same_part_of_every_saved_factor_is_told(names: Namespace, part: Any, words: str) -> None:
    path = edit(names.adapter(), zeroed(part))
    assert both(path, BASES["base"]()) == [["LORA445"], ["LORA445"]]
    assert words in str(check_checkpoint(path))
    assert not loud(check_checkpoint(path, expect=Expect(fresh=True)))


@pytest.mark.parametrize(
    "part",
    [
        lambda b: b[::2],
        lambda b: b[: len(b) // 3],
        lambda b: b[:, :4] if len(b) > 40 else b[:0],
        lambda b: b[:1],
    ],
    ids=["every other row", "a third", "ranks of one kind of modules", "a row"],
)
def test_saved_factors_that_are_zero_elsewhere_are_left_alone(names: Namespace, part: Any) -> None:
    path = edit(names.adapter(), zeroed(part))
    assert both(path, BASES["base"]()) == [[], []]


def test_ranks_that_are_padded_in_both_saved_factors_are_left_alone(names: Namespace) -> None:
    def pad(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            (tensor[:, 4:] if "lora_B" in name else tensor[4:]).zero_()
        return tensors

    assert both(edit(names.adapter(), pad), BASES["base"]()) == [[], []]


def test_a_whole_model_with_its_adapter_unmerged(tmp_path: Path) -> None:
    """A state dict of the wrapped model is no adapter and no model: the names in its file say so."""
    model = get_peft_model(BASES["base"](), LoraConfig(r=4, target_modules=["q_proj"]))
    whole: dict[str, torch.Tensor] = {k: v.clone() for k, v in model.base_model.model.state_dict().items()}
    told = {}
    for name, state in (("wrapped", whole), ("plain", {k: v for k, v in whole.items() if "lora_" not in k})):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        told[name] = check_checkpoint(tmp_path / name)
    assert loud(told["wrapped"]) == loud(told["plain"]) == ["LORA411"]
    assert "holds a whole model with its LoRA layers, not merged" in told["wrapped"].errors[0].observed
    assert "the folder holds model.safetensors" in told["plain"].errors[0].observed
    (tmp_path / "wrapped" / "model.safetensors").write_bytes(b"no header")
    assert "the folder holds model.safetensors" in check_checkpoint(tmp_path / "wrapped").errors[0].observed
