"""Every tool's defaults, and what each of its keys does, written as values.

Sources: ``AxolotlInputConfig``, LLaMA-Factory's ``hparams``, TRL's ``ModelConfig`` and trainers' configurations, and
ms-swift's ``arguments``; where these leave a field to ``TrainingArguments``, that one's default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_lora.facts.recipe import RunSetting, Value
from pytest_lora.inspection.recipe import recognised
from pytest_lora.inspection.recipe.beside import Tree
from pytest_lora.inspection.recipe.keys import VISION
from pytest_lora.inspection.recipe.yaml_file import read_yaml


def told(text: str, folder: Path = Path("nowhere")) -> tuple[str | None, str, RunSetting | None]:
    """The tool of a recipe, why it is left alone, and its setting."""
    found = recognised(read_yaml(text.encode()))
    if found is None:
        return None, "", None
    tool, keys = found
    why = tool.left_alone(keys)
    return tool.NAME, why, None if why else tool.setting(keys, Tree(folder))


def setting(text: str, folder: Path = Path("nowhere")) -> RunSetting:
    _, why, found = told(text, folder)
    assert found is not None, why
    return found


def values(found: RunSetting) -> dict[str, Any]:
    """Every value that is not None."""
    every = {name: getattr(found, name) for name in found.__slots__}
    return {
        name: one.value for name, one in every.items() if isinstance(one, Value) and one.value is not None
    }


AXOLOTL = "base_model: a/b\nadapter: lora\n"
FACTORY = "model_name_or_path: a/b\nstage: sft\ndo_train: true\n"
TRL = "model_name_or_path: a/b\nuse_peft: true\ndataset_name: data\n"
SWIFT = "model: a/b\ntuner_type: lora\ndataset: data\n"
OWN = "base_model: a/b\nlora_r: 4\nlora_alpha: 8\n"

SHARED = {
    "base": "a/b",
    "adapter": "lora",
    "objective": "sft",
    "use_rslora": False,
    "use_dora": False,
    "packing": False,
    "optimizer": "adamw_torch_fused",
    "load_best_model_at_end": False,
    "strategy": "ddp",
}
DEFAULTS = {
    AXOLOTL: {
        **SHARED, "double_quant": True, "quant_storage": "bfloat16", "dtype": "bfloat16", "precision": "bf16",
        "lora_dropout": 0.0, "batch_size": 1, "accumulation": 1, "seq_len": 512, "loss": "full", "kernels": True,
        "gradient_checkpointing": False, "schedule": "cosine",
        "epochs": 1.0,
    },
    FACTORY: {
        **SHARED, "double_quant": True, "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear",
        "exclude_modules": VISION, "batch_size": 8, "accumulation": 1, "seq_len": 2048, "attention": "auto",
        "loss": "full", "gradient_checkpointing": "reentrant", "learning_rate": 0.00005, "schedule": "linear",
        "epochs": 3.0, "loss_on": "answers", "eval_strategy": "no", "save_strategy": "steps", "save_steps": 500,
    },
    TRL: {
        **SHARED, "double_quant": False, "dtype": "float32", "precision": "bf16", "r": 16, "lora_alpha": 32,
        "lora_dropout": 0.05, "task_type": "CAUSAL_LM", "batch_size": 8, "accumulation": 1, "seq_len": 1024,
        "loss": "chunked", "gradient_checkpointing": True, "learning_rate": 0.00002, "schedule": "linear",
        "warmup_steps": 0, "epochs": 3.0, "loss_on": "all tokens", "eval_strategy": "no", "save_strategy": "steps",
        "save_steps": 500,
    },
    SWIFT: {
        **SHARED, "double_quant": True, "r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear",
        "exclude_modules": VISION, "bias": "none", "batch_size": 1, "accumulation": 16, "loss": "full",
        "gradient_checkpointing": True, "learning_rate": 0.0001, "schedule": "cosine", "epochs": 3.0,
        "save_strategy": "steps", "save_steps": 500,
    },
    OWN: {
        "base": "a/b", "adapter": "lora", "r": 4, "lora_alpha": 8, "double_quant": False,
        "load_best_model_at_end": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("text", DEFAULTS)
def test_the_defaults_of_each_tool(text: str) -> None:
    assert values(setting(text)) == DEFAULTS[text]


CHANGES = [
    # Axolotl
    (AXOLOTL, "tokens: [x, y]", {"new_tokens": 2}),
    (AXOLOTL, "special_tokens: {additional_special_tokens: ['<|im_end|>', mine, '[INST]']}", {"new_tokens": 1}),
    (AXOLOTL, "special_tokens: {additional_special_tokens: ['<|im_end|>']}", {}),
    (AXOLOTL, "special_tokens: {pad_token: x}", {}),
    (AXOLOTL, "tokens: [x, y]\nspecial_tokens: {additional_special_tokens: [mine]}", {"new_tokens": 2}),
    (AXOLOTL, "load_in_8bit: true", {"quantization": "int8", "dtype": "float16", "kernels": False}),
    (AXOLOTL, "load_in_8bit: false", {}),
    (AXOLOTL.replace("lora", "qlora"), "load_in_4bit: true", {"adapter": "qlora", "quantization": "nf4"}),
    (AXOLOTL.replace("lora", "qlora"), "gptq: true", {"adapter": "qlora", "quantization": "nf4"}),
    (AXOLOTL.replace("lora", "qlora"), "load_in_8bit: true", {"adapter": "qlora", "dtype": "float16"}),
    (AXOLOTL, "rl: dpo", {"objective": "dpo", "kernels": False}),
    (AXOLOTL, "trust_remote_code: true", {"kernels": False}),
    (AXOLOTL, "trust_remote_code: false", {}),
    (AXOLOTL, "lora_mlp_kernel: true", {"kernels": False}),
    (AXOLOTL, "lora_embedding_kernel: false", {"kernels": False}),
    (AXOLOTL, "rl: dpo\nlora_mlp_kernel: true\nlora_qkv_kernel: true\nlora_o_kernel: true", {"objective": "dpo"}),
    (AXOLOTL, "bf16: auto", {}),
    (AXOLOTL, "bf16: full", {}),
    (AXOLOTL, "bfloat16: true", {}),
    (AXOLOTL, "bf16: false", {"precision": None, "dtype": "float32"}),
    (AXOLOTL, "bf16: false\nfp16: true", {"precision": "fp16", "dtype": "float16"}),
    (AXOLOTL, "float16: true", {"precision": "fp16", "dtype": "float16"}),
    (AXOLOTL, "lora_target_modules: [q_proj]", {"target_modules": ("q_proj",)}),
    (AXOLOTL, "lora_target_modules: [q_proj]\nlora_target_linear: true", {"target_modules": "all-linear"}),
    (AXOLOTL, "lora_target_modules: [q_proj]\nlora_target_linear: false", {"target_modules": ("q_proj",)}),
    (AXOLOTL, "flash_attention: true", {"attention": "flash_attention_2"}),
    (AXOLOTL, "flash_attention: false\nsdp_attention: true", {"attention": "sdpa"}),
    (AXOLOTL, "flash_attention: true\nattn_implementation: eager", {"attention": "eager"}),
    (AXOLOTL, "cut_cross_entropy: true", {"loss": "chunked"}),
    (AXOLOTL, "cut_cross_entropy: false", {}),
    (AXOLOTL, "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]", {"loss": "chunked"}),
    (AXOLOTL, "plugins: [axolotl.integrations.liger.LigerPlugin]", {}),
    (AXOLOTL, "gradient_checkpointing: no", {}),
    (AXOLOTL, "gradient_checkpointing: unsloth", {"gradient_checkpointing": "reentrant"}),
    (AXOLOTL, "tensor_parallel_size: 2", {"strategy": None}),
    (AXOLOTL, "deepspeed: zero2", {"strategy": "zero2"}),
    (AXOLOTL, "peft_layers_to_transform: [0, 1]", {"layers_to_transform": [0, 1]}),
    # LLaMA-Factory
    (FACTORY, "lora_rank: 3", {"r": 3, "lora_alpha": 6}),
    (FACTORY, "lora_rank: x", {"r": None, "lora_alpha": None}),
    (FACTORY, "lora_alpha: x", {"lora_alpha": None}),
    (FACTORY, "lora_alpha: 3", {"lora_alpha": 3.0}),
    (FACTORY, "lora_target: all,q", {"target_modules": ("all", "q")}),
    (FACTORY, "freeze_vision_tower: false", {"exclude_modules": None}),
    (FACTORY, "additional_target: a, b", {"modules_to_save": ("a", "b")}),
    (FACTORY, "adapter_name_or_path: x,y", {"continues": "y"}),
    (FACTORY, "adapter_name_or_path: []", {}),
    (FACTORY, "adapter_name_or_path: x\ncreate_new_adapter: true", {}),
    (FACTORY, "adapter_name_or_path: x\ncreate_new_adapter: false", {"continues": "x"}),
    (FACTORY, "adapter_name_or_path: x\ncreate_new_adapter: true\nquantization_bit: 4",
     {"continues": "x", "quantization": "nf4"}),
    (FACTORY, "adapter_name_or_path: x\ncreate_new_adapter: true\nuse_unsloth: true",
     {"continues": "x", "loss": "chunked"}),
    (FACTORY, "adapter_name_or_path: x\ncreate_new_adapter: true\ndeepspeed: zero3",
     {"continues": "x", "strategy": "zero3"}),
    (FACTORY, "adapter_name_or_path: x\ncreate_new_adapter: true\ndeepspeed: zero2", {"strategy": "zero2"}),
    (FACTORY, "quantization_bit: 8", {"quantization": "int8"}),
    (FACTORY, "quantization_bit: 4\nquantization_type: fp4", {"quantization": "fp4"}),
    (FACTORY, "quantization_bit: 2", {}),
    (FACTORY, "quantization_bit: 2\nquantization_method: hqq", {"quantization": "hqq"}),
    (FACTORY, "bf16: true", {"quant_storage": "bfloat16", "precision": "bf16", "dtype": "bfloat16"}),
    (FACTORY, "pure_bf16: true", {"quant_storage": "bfloat16", "precision": "bf16", "dtype": "bfloat16"}),
    (FACTORY, "fp16: true", {"quant_storage": "float16", "precision": "fp16", "dtype": "float16"}),
    (FACTORY, "enable_liger_kernel: true", {"loss": "chunked"}),
    (FACTORY, "disable_gradient_checkpointing: true", {"gradient_checkpointing": False}),
    (FACTORY, "use_reentrant_gc: false", {"gradient_checkpointing": True}),
    (FACTORY, "packing: true", {"packing": True}),
    (FACTORY, "neat_packing: true", {"packing": "separate"}),
    (FACTORY, "train_on_prompt: true", {"loss_on": "all tokens"}),
    # TRL
    (TRL, "beta: 0.1", {"objective": "dpo", "learning_rate": 0.000001, "loss": "full"}),
    (TRL, "num_generations: 4", {"objective": "grpo", "learning_rate": 0.000001, "loss": "full"}),
    (TRL, "load_in_4bit: true", {"quantization": "nf4"}),
    (TRL, "load_in_4bit: true\nbnb_4bit_quant_type: fp4", {"quantization": "fp4"}),
    (TRL, "load_in_8bit: true", {"quantization": "int8"}),
    (TRL, "load_in_8bit: false", {}),
    (TRL, "dtype: auto", {"dtype": None}),
    (TRL, "dtype: bf16", {"dtype": "bfloat16"}),
    (TRL, "fp16: true", {"precision": "fp16"}),
    (TRL, "bf16: false", {"precision": None}),
    (TRL, "lora_target_modules: [all-linear]", {"target_modules": "all-linear"}),
    (TRL, "lora_target_modules: [q, k]", {"target_modules": ("q", "k")}),
    (TRL, "lora_target_modules: q", {"target_modules": "q"}),
    (TRL, "assistant_only_loss: true", {"loss_on": "answers"}),
    (TRL, "completion_only_loss: true", {"loss_on": "answers"}),
    (TRL, "deepspeed: zero1", {"strategy": "zero1"}),
    (TRL, "zero_stage: 0", {"strategy": "zero0"}),
    (TRL, "zero_stage: 1", {"strategy": "zero1"}),
    (TRL, "zero_stage: 2", {"strategy": "zero2"}),
    (TRL, "zero_stage: 3", {"strategy": "zero3"}),
    (TRL, "zero_stage: 4", {}),
    # ms-swift
    (SWIFT, "per_device_train_batch_size: 3", {"batch_size": 3, "accumulation": 6}),
    (SWIFT, "per_device_train_batch_size: 0", {"batch_size": 0, "accumulation": None}),
    (SWIFT, "gradient_accumulation_steps: 2", {"accumulation": 2}),
    (SWIFT, "per_device_train_batch_size: 4\nENV: {NPROC_PER_NODE: 2}",
     {"batch_size": 4, "accumulation": 2, "gpus": 2}),
    (SWIFT, "ENV: {OTHER: 2}", {}),
    (SWIFT, "target_modules: [all-linear]", {}),
    (SWIFT, "target_modules: [q]", {"target_modules": ("q",), "exclude_modules": None}),
    (SWIFT, "target_modules: [q]\nfreeze_vit: true",
     {"target_modules": ("q",), "exclude_modules": None, "scope": "language_model"}),
    (SWIFT, "target_modules: [q]\nfreeze_vit: false", {"target_modules": ("q",), "exclude_modules": None}),
    (SWIFT, "freeze_vit: true", {}),
    (SWIFT, "freeze_vit: false", {"exclude_modules": None}),
    (SWIFT, "adapters: [x, y]", {"continues": "x"}),
    (SWIFT, "adapters: x", {"continues": "x"}),
    (SWIFT, "adapters: []", {"continues": ()}),
    (SWIFT, "new_special_tokens: [x, y]", {"new_tokens": 2}),
    (SWIFT, "new_special_tokens: tokens.txt", {"new_tokens": 1}),
    (SWIFT, "quant_method: bnb\nquant_bits: 4", {"quantization": "nf4"}),
    (SWIFT, "quant_method: bnb\nquant_bits: 8", {"quantization": "int8"}),
    (SWIFT, "quant_method: bnb\nquant_bits: 4\nbnb_4bit_quant_type: fp4", {"quantization": "fp4"}),
    (SWIFT, "quant_method: fp8", {"quantization": "fp8"}),
    (SWIFT, "quant_method: hqq\nquant_bits: 4", {"quantization": "hqq"}),
    (SWIFT, "torch_dtype: fp16", {"dtype": "float16", "precision": "fp16"}),
    (SWIFT, "torch_dtype: bfloat16", {"dtype": "bfloat16", "precision": "bf16"}),
    (SWIFT, "torch_dtype: float32", {"dtype": "float32"}),
    (SWIFT, "bf16: true", {"precision": "bf16"}),
    (SWIFT, "use_liger_kernel: true", {"loss": "chunked"}),
    (SWIFT, "tuner_backend: unsloth", {"loss": "chunked"}),
    (SWIFT, "tuner_backend: peft", {}),
    (SWIFT, "rlhf_type: dpo", {"objective": "dpo"}),
    (SWIFT, "deepspeed: zero3_offload", {"strategy": "zero3_offload"}),
    # One's own
    (OWN, "load_in_4bit: true", {"quantization": "nf4"}),
    (OWN, "load_in_4bit: true\nbnb_4bit_quant_type: fp4", {"quantization": "fp4"}),
    (OWN, "use_4bit: true", {"quantization": "nf4"}),
    (OWN, "load_in_8bit: true\nbnb_4bit_quant_type: fp4", {"quantization": "int8"}),
    (OWN, "torch_dtype: torch.bf16", {"dtype": "bfloat16"}),
    (OWN, "dtype: float32", {"dtype": "float32"}),
    (OWN, "fp16: true", {"precision": "fp16"}),
    (OWN, "bf16: false", {}),
    (OWN, "target_modules: all", {"target_modules": "all-linear"}),
    (OWN, "target_modules: [all-linear]", {"target_modules": "all-linear"}),
    (OWN, "target_modules: [all, q]", {"target_modules": ("all", "q")}),
    (OWN, "target_modules: q,k", {"target_modules": ("q", "k")}),
    (OWN, "modules_to_save: lm_head", {"modules_to_save": ("lm_head",)}),
    (OWN, "modules_to_save: [a, b]", {"modules_to_save": ("a", "b")}),
    (OWN, "stage: SFT", {"objective": "sft"}),
    (OWN, "freeze_vit: true", {"scope": "language_model"}),
    (OWN, "freeze_vit: false", {}),
    (OWN, "deepspeed: zero2", {"strategy": "zero2"}),
    (OWN, "new_tokens: [x, y]", {"new_tokens": 2}),
    (OWN, "new_tokens: x", {"new_tokens": 0}),
    (OWN, "more: {r: 2, name: x, deeper: {rank: 3, model_name_or_path: c}}", {"base": "c"}),
    (OWN, "fsdp: full_shard\nfsdp_version: 2", {"strategy": "fsdp2"}),
    ("model: {dtype: bf16, path: a/b}\nname: c\nlora: {r: 4, alpha: 8}\n", "", {"dtype": "bfloat16"}),
    ("model: x\nmodel_id: a/b\nlora_r: 4\nlora_alpha: 8\n", "", {}),
    ("model: a/b\nlora_r: 4\nlora_alpha: 8\n", "", {}),
    ("model: {path: a/b}\nlora: {r: 4, alpha: 8}\n", "", {}),
    ("model: {path: a/b}\nours: {r: 4, lora_alpha: 8, dropout: 0.5}\n", "", {"lora_dropout": 0.5}),
    ("base: {id: a/b}\na: {a: {lora: {r: 4, alpha: 8, a: {lora_dropout: 0.5}}}}\n", "", {}),
    ("base: {id: a/b}\nlora: {r: 4, lora_alpha: 8}\nlora_r: 5\n", "", {"r": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "more", "changes"), CHANGES)
def test_what_a_key_changes(text: str, more: str, changes: dict[str, Any]) -> None:
    usual = DEFAULTS.get(text.replace("qlora", "lora"), DEFAULTS[OWN])
    wanted = {name: value for name, value in {**usual, **changes}.items() if value is not None}
    assert values(setting(f"{text}{more}\n")) == wanted


@pytest.mark.parametrize(
    ("text", "tool", "why"),
    [
        ("base_model: a\nlora_alpha: 8\n", None, ""),
        ("adapter: lora\nlora_r: 8\n", None, ""),
        ("base_model: a\nadapter: lora\nmodel_name_or_path: b\nuse_peft: true\n", "TRL", ""),
        ("base_model: a\nadapter: llama-adapter\n", "Axolotl", "its adapter is llama-adapter"),
        ("base_model: a\nadapter:\ndatasets: x\nlora_r: 8\n", "Axolotl", "its adapter is empty: it trains all weights"),
        ("base_model: a\nmicro_batch_size: 1\n", "Axolotl", "it trains all weights"),
        ("base_model: a\nmicro_batch_size: 1\nlora_alpha: 8\n", "Axolotl", ""),
        ("model_name_or_path: a\nexport_dir: d\ntemplate: x\n", "LLaMA-Factory", "it exports a model"),
        ("model_name_or_path: a\nexport_dir: d\n", None, ""),
        ("model_name_or_path: a\ntemplate: x\n", None, ""),
        ("model_name_or_path: a\nadapter_name_or_path: c\n", None, ""),
        ("model_name_or_path: a\ntemplate: x\ninfer_backend: y\n", "LLaMA-Factory",
         "it trains nothing: do_train is not true"),
        ("stage: sft\nlora_rank: 8\n", None, ""),
        (FACTORY + "finetuning_type: oft\n", "LLaMA-Factory", "its finetuning_type is oft"),
        (FACTORY + "export_dir: d\n", "LLaMA-Factory", ""),
        ("model_name_or_path: a\ndataset_name: d\n", "TRL", "it trains all weights"),
        ("model_name_or_path: a\ndataset_name: d\nlora: 3\n", "TRL", "it trains all weights"),
        ("model_name_or_path: a\ndataset_name: d\nlora: {r: 3}\n", "TRL", ""),
        ("model_name_or_path: a\ndataset_name: d\nlora_r: 3\n", "TRL", ""),
        ("model_name_or_path: a\nlora_r: 3\n", None, ""),
        ("model: {a: b}\ntuner_type: lora\ndataset: x\n", None, ""),
        ("model: a\ndataset: x\n", None, ""),
        (SWIFT + "global_batch_size: 8\n", "ms-swift", "it is one of Megatron-SWIFT"),
        (SWIFT.replace("lora", "full"), "ms-swift", "its tuner_type is full"),
        (SWIFT + "merge_lora: true\n", "ms-swift", "it trains nothing"),
        (SWIFT + "merge_lora: true\nlearning_rate: 1e-4\n", "ms-swift", ""),
        ("model: a\ntuner_type: lora\n", "ms-swift", "it trains nothing: it names no dataset"),
        ("base_model: a\nlora_r: 8\n", None, ""),
        ("base_model: a\nlora_r: 8\nlr: 1\n", "your own script", ""),
        ("base_model: a\nlora_dropout: 0.1\nlr: 1\n", None, ""),
        ("lora_r: 8\nlora_alpha: 8\n", None, ""),
        (OWN + "use_lora: false\n", "your own script", "use_lora is off"),
        (OWN + "use_lora: true\n", "your own script", ""),
        (OWN + "lora_enable: no\n", "your own script", "lora_enable is off"),
    ],
)  # fmt: skip
def test_which_tool_and_whether_it_trains_an_adapter(text: str, tool: str | None, why: str) -> None:
    assert told(text)[:2] == (tool, why)


@pytest.mark.parametrize(
    ("text", "field", "line", "key", "asked"),
    [
        ("base_model: a\nsample_packing: true\nlora_alpha: 8\nlora_r: 8\n", "adapter", 4, "adapter", "lora_r"),
        ("base_model: a\nadapter: qlora\n", "quantization", 2, "load_in_4bit", "adapter: qlora (4 bits)"),
        ("base_model: a\nadapter: qlora\nload_in_4bit: no\n", "quantization", 3, "load_in_4bit",
         "adapter: qlora (4 bits)"),
        (AXOLOTL + "load_in_4bit: true\n", "quantization", 3, "load_in_4bit", "load_in_4bit: true (4-bit weights)"),
        ("base_model: a\nlora_r: 8\ndatasets: x\nload_in_8bit: true\n", "quantization", None, "load_in_4bit", None),
        (AXOLOTL + "special_tokens:\n  additional_special_tokens:\n    - mine\n", "new_tokens", 5,
         "additional_special_tokens", None),
        (AXOLOTL + "fp16: true\n", "precision", 3, "fp16", None),
        (AXOLOTL + "load_in_4bit: false\n", "quantization", None, "load_in_4bit", None),
        (FACTORY + "quantization_method: bnb\n", "quantization", 4, "quantization_bit", "quantization_method: bnb"),
        (FACTORY + "quantization_method: gptq\n", "quantization", None, "quantization_bit", None),
        (FACTORY + "quantization_bit: 4\nquantization_method: bitsandbytes\n", "quantization", 5,
         "quantization_method", "4-bit weights"),
        ("model_name_or_path: a\ndataset_name: d\nlora_r: 3\n", "adapter", 3, "use_peft", "lora_r"),
        ("model_name_or_path: a\ndataset_name: d\nuse_peft: false\nlora_r: 3\n", "adapter", 3, "use_peft", "lora_r"),
        ("model_name_or_path: a\ndataset_name: d\npeft: {r: 3}\n", "adapter", 3, "use_peft", "peft"),
        (TRL + "beta: 1\n", "objective", 4, "beta", None),
        (SWIFT + "quant_bits: 4\n", "quantization", 4, "quant_bits", "quant_bits: 4 (4-bit weights)"),
        (SWIFT + "quant_method: bnb\n", "quantization", 4, "quant_bits", "quant_method: bnb"),
        (SWIFT + "ENV:\n  NPROC_PER_NODE: 2\n", "gpus", 5, "ENV", None),
    ],
)  # fmt: skip
def test_the_line_that_decides_and_what_was_asked_for(
    text: str, field: str, line: int | None, key: str, asked: str | None
) -> None:
    found: Value = getattr(setting(text), field)
    assert (found.line, found.key, found.asked) == (line, key, asked)
    assert (found.asked is None) is (found.why == "")
