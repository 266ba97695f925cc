"""From the words of recipes to strategies, steps and adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from pytest_lora.facts.memory import Quantization
from pytest_lora.facts.recipe import RunSetting, Value
from pytest_lora.inspection.recipe.adapter import (
    linear_names,
    lora_config,
    step_arguments,
    ways_of_a_step,
    weights_at_least,
)
from pytest_lora.inspection.recipe.beside import (
    MOST_MODULES,
    Tree,
    on_host,
    strategy_by_name,
    strategy_of_accelerate,
    zero_stage,
)


def run(**values: Any) -> RunSetting:
    return RunSetting("TRL", **{name: Value(value, "line 1") for name, value in values.items()})


STEP = {"batch_size": 2, "seq_len": 512}
USUAL = {
    "batch_size": 2,
    "seq_len": 512,
    "quantization": None,
    "dtype": "bfloat16",
    "gradient_checkpointing": False,
    "optimizer": "adamw_torch",
    "accumulation": 1,
}
UNCAST = {"prepare_for_kbit": False, "adapter_dtype": "bfloat16", "upcast": ("lora_magnitude_vector",)}
"""What TRL leaves as it is in a quantized base, and what it casts."""


@pytest.mark.parametrize(
    ("values", "storage"),
    [
        ({"quant_storage": "bfloat16", "strategy": "fsdp1"}, "bfloat16"),
        ({"quant_storage": "float32", "strategy": "zero3_offload"}, "float32"),
        ({"quant_storage": "bfloat16", "strategy": "ddp"}, None),
        ({"quant_storage": "uint8", "strategy": "fsdp1"}, None),
        ({"strategy": "fsdp1"}, None),
    ],
)
def test_packed_weights_are_stored_in_floats_where_they_are_divided(
    values: dict[str, Any], storage: str | None
) -> None:
    asked = step_arguments(run(**STEP, quantization="nf4", double_quant=True, **values), "bfloat16")
    assert asked is not None
    assert asked["quantization"] == Quantization("nf4", double_quant=True, storage=storage or "uint8")


@pytest.mark.parametrize(
    ("values", "base_dtype", "changes"),
    [
        ({}, None, {}),
        ({}, "float16", {"dtype": "float16"}),
        ({"dtype": "bfloat16"}, "float16", {}),
        ({"dtype": "float32"}, None, {"dtype": "float32", "autocast": False}),
        ({}, "float8_e4m3fn", None),
        ({"quantization": "nf4"}, None, {"quantization": Quantization("nf4"), **UNCAST}),
        ({"quantization": "int8"}, None, {"quantization": "int8", **UNCAST}),
        ({"quantization": "gptq"}, None, None),
        ({"batch_size": 1}, None, {"batch_size": 1}),
        ({"batch_size": 0}, None, None),
        ({"seq_len": 1}, None, {"seq_len": 1}),
        ({"seq_len": 0}, None, None),
        ({"seq_len": "512"}, None, None),
        ({"batch_size": None}, None, None),
        ({"accumulation": 4}, None, {"accumulation": 4}),
        ({"accumulation": 0}, None, {}),
        ({"gradient_checkpointing": "reentrant"}, None, {"gradient_checkpointing": "reentrant"}),
        ({"optimizer": "adamw_hf"}, None, {}),
        ({"optimizer": "paged_adamw_8bit"}, None, {"optimizer": "paged_adamw_8bit"}),
        ({"optimizer": "adamw_torch_fused"}, None, {"optimizer": "adamw_torch_fused"}),
        ({"optimizer": "an_own_one"}, None, {}),
    ],
)
def test_the_step_of_a_run(
    values: dict[str, Any], base_dtype: str | None, changes: dict[str, Any] | None
) -> None:
    found = step_arguments(run(**{**STEP, **values}), base_dtype)
    assert found == (None if changes is None else {**USUAL, **changes})


@pytest.mark.parametrize(
    ("values", "base_dtype", "bytes_of_a_thousand"),
    [
        ({}, None, 2000),
        ({}, "float32", 4000),
        ({"dtype": "bfloat16"}, "float32", 2000),
        ({"quantization": "nf4"}, "float32", 500),
        ({"quantization": "fp4"}, None, 500),
        ({"quantization": "int8"}, None, 1000),
    ],
)
def test_weights_take_at_least(
    values: dict[str, Any], base_dtype: str | None, bytes_of_a_thousand: int
) -> None:
    assert weights_at_least(run(**values), 1000, base_dtype) == bytes_of_a_thousand


def test_the_adapter_of_a_run() -> None:
    usual = {"r": 8, "lora_alpha": 16.0, "target_modules": ("q_proj",), "exclude_modules": ("vision",)}
    config = lora_config(run(**usual, layers_to_transform="0-3"))
    assert config is not None
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, {"q_proj"})
    assert type(config.lora_alpha) is int
    assert (config.task_type, config.exclude_modules, config.layers_to_transform) == ("CAUSAL_LM", None, None)
    whole = lora_config(
        run(**usual, layers_to_transform=[0, 3], task_type="seq_cls"), several_modalities=True
    )
    assert whole is not None
    assert (whole.task_type, whole.exclude_modules, whole.layers_to_transform) == (
        "SEQ_CLS",
        {"vision"},
        [0, 3],
    )
    for layers, kept in ((2, 2), ([0, "1"], None)):
        one = lora_config(run(**usual, layers_to_transform=layers))
        assert one is not None
        assert one.layers_to_transform == kept
    assert lora_config(run(target_modules="all|q", layers_to_transform=[0])) is None
    half = lora_config(run(lora_alpha=0.5))
    assert half is not None
    assert half.lora_alpha == 0.5


def test_linear_names_leave_out_the_head() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.q, self.c_attn, self.norm, self.head = (
                nn.Linear(2, 2),
                Conv1D(2, 2),
                nn.LayerNorm(2),
                nn.Linear(2, 2),
            )

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert linear_names(Model()) == ["c_attn", "q"]

    class Refusing(Model):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert linear_names(Refusing()) == ["c_attn", "head", "q"]


CUT = Value("chunked", "line 1", "cut_cross_entropy")
DPO, LIGER = {"trainer": "trl-dpo"}, {"kernels": "liger"}


@pytest.mark.parametrize(
    ("loss", "own", "ways"),
    [
        (Value("full"), {}, [({}, 1)]),
        (replace(CUT, value="full"), {}, [({}, 1)]),
        (CUT, {}, [({"loss": "cut"}, 1), ({}, 1)]),
        (Value("full"), {"trainer": "trl-sft"}, [({"trainer": "trl-sft"}, 1), ({}, 1)]),
        (Value("full"), DPO, [(DPO, 1), ({}, 2)]),
        (Value("full"), {**DPO, **LIGER}, [({**DPO, **LIGER}, 1), (DPO, 1), ({}, 2)]),
        (CUT, DPO, [(DPO, 1), ({"loss": "cut"}, 2), ({}, 2)]),
    ],
)
def test_a_step_is_estimated_the_truest_way_first(
    loss: Value, own: dict[str, Any], ways: list[tuple[dict[str, Any], int]]
) -> None:
    setting = replace(run(), loss=loss, by_trainer=tuple(own.items()))
    assert [tuple(way) for way in ways_of_a_step(setting)] == ways


FSDP = "fsdp1"
"""What accelerate takes where no version is said."""


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("configs/ds_zero3.json", "zero3"),
        ("ZeRO-3_offload", "zero3_offload"),
        ("zero2_offload", "zero2"),
        ("ds_z1_config.json", "zero1"),
        ("z0", "zero0"),
        ("fsdp2", "fsdp2"),
        ("fsdp_v2", "fsdp2"),
        ("fsdp", FSDP),
        ("fsdp_offload", f"{FSDP}_offload"),
        ("none", None),
    ],
)
def test_strategies_by_name(name: str, strategy: str | None) -> None:
    assert strategy_by_name(name) == strategy


ZERO = {"distributed_type": "DEEPSPEED"}


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        ({}, None),
        ({"distributed_type": "MULTI_GPU"}, "ddp"),
        ({"distributed_type": "NO"}, None),
        ({"distributed_type": "fsdp"}, FSDP),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}}, f"{FSDP}_offload"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": False}}, FSDP),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "fsdp2"),
        ({"distributed_type": "FSDP", "fsdp_config": "x"}, FSDP),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "zero0"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, None),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": None}, None),
        ({**ZERO, "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}}, "zero3_offload"),
        ({**ZERO, "deepspeed_config": {"zero_stage": 3, "offload_param_device": "none"}}, "zero3"),
        ({**ZERO, "deepspeed_config": {"zero_stage": 1}}, "zero1"),
        ({**ZERO, "deepspeed_config": {"zero_stage": 2, "offload_param_device": "cpu"}}, "zero2"),
    ],
)  # fmt: skip
def test_strategies_of_accelerate(config: dict[str, Any], strategy: str | None) -> None:
    assert strategy_of_accelerate(config) == strategy


@pytest.mark.parametrize(
    ("zero", "stage", "moved"),
    [
        ({"stage": 3, "offload_param": {"device": "cpu"}}, 3, True),
        ({"stage": 2, "offload_param": {"device": "NVMe"}}, 2, True),
        ({"stage": 1, "offload_param": {"device": "none"}}, 1, False),
        ({"stage": True, "offload_param": {}}, None, False),
        ({"offload_param": "cpu"}, None, False),
    ],
)
def test_what_deepspeed_is_told(zero: dict[str, Any], stage: int | None, moved: bool) -> None:
    assert zero_stage({"zero_optimization": zero}) == stage
    assert zero_stage({"zero_optimization": 3}) is None
    assert on_host(zero, "offload_param") is moved


def test_folders_beside_a_recipe(tmp_path: Path) -> None:
    def written(name: str, **files: Any) -> None:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))

    written("adapter", adapter_config={"r": 8, "base_model_name_or_path": "org/base"})
    written("odd", adapter_config={"r": True, "base_model_name_or_path": 3})
    written("both", adapter_config={"r": 8}, config={"num_hidden_layers": 2})
    written("model", config={"num_hidden_layers": 2, "num_attention_heads": 4})
    written("large", config={"num_hidden_layers": MOST_MODULES + 1})
    written("just", config={"num_hidden_layers": MOST_MODULES})
    written("empty", config={})
    tree = Tree(tmp_path)
    found = tree.adapter("adapter")
    assert found is not None
    assert (found.path, found.r, found.base) == ("adapter", 8, "org/base")
    odd = tree.adapter("odd")
    assert odd is not None
    assert (odd.r, odd.base) == (None, None)
    assert tree.adapter("both") is None
    assert tree.adapter("model") is None
    assert tree.adapter("nowhere") is None
    assert {name: tree.base(name) is not None for name in ("model", "large", "just", "empty", "adapter")} == {
        "model": True,
        "large": False,
        "just": True,
        "empty": False,
        "adapter": False,
    }


@pytest.mark.parametrize(
    ("lines", "are"),
    [
        ([{"messages": [{"role": "user"}]}], True),
        ([{"text": "a"}, {"messages": [{"role": "system"}, {"role": "user"}]}], True),
        ([{"text": "a"}, {"text": "a"}, {"messages": [{"role": "user"}]}], False),
        ([{"messages": [{"role": "assistant"}]}], False),
        ([{"messages": "user"}], False),
        ([["messages"]], False),
        ([], False),
    ],
)
def test_conversations_are_known_by_the_first_two_rows(tmp_path: Path, lines: list[Any], are: bool) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert Tree(tmp_path).holds_conversations("train.jsonl") is are
    assert not Tree(tmp_path).holds_conversations("nowhere.jsonl")


@pytest.mark.parametrize("tool", ["Axolotl", "LLaMA-Factory", "TRL", "ms-swift"])
def test_only_where_nothing_is_known_of_a_tool_is_a_quantized_base_cast_to_float32(tool: str) -> None:
    quantized = replace(run(**STEP, quantization="nf4"), tool=tool)
    known = tool != "ms-swift"
    assert (step_arguments(quantized, None) or {}).get("prepare_for_kbit") == (False if known else None)
    assert "prepare_for_kbit" not in (step_arguments(replace(quantized, quantization=Value()), None) or {})
