"""What the code blocks of README.md and docs/ take for granted: names, and files beside them.

A block that uses one of the public names here without making it gets a fresh one. All are tiny and on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_lora.report.baseline import to_json


def tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=128,
                bos_token_id=1,
                eos_token_id=2,
            )
        )


def a_config() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def a_model() -> PeftModel:
    return get_peft_model(tiny_llama(), a_config())


def a_batch() -> dict[str, Tensor]:
    rows = torch.arange(2 * 16).reshape(2, 16) % 256
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}


def a_dataset() -> list[dict[str, list[int]]]:
    return [{name: rows[0].tolist() for name, rows in a_batch().items()} for _ in range(8)]


NAMES: dict[str, Any] = {
    "base": tiny_llama,
    "batch": a_batch,
    "batches": lambda: [a_batch()] * 3,
    "config": a_config,
    "model": a_model,
    "my_base": tiny_llama,
    "the_lora_config_that_was_meant": a_config,
    "train_dataset": a_dataset,
}
"""The names, and what makes each."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(name)
    return NAMES[name]()


RECIPE = """
base_model: Qwen/Qwen2.5-0.5B
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
datasets:
  - path: data.jsonl
    type: alpaca
sequence_len: 1024
micro_batch_size: 1
num_epochs: 1
learning_rate: 0.0002
bf16: true
"""
"""A recipe of Axolotl."""


def lay_out(folder: Path) -> None:
    """Save what blocks and commands name: bases, adapters, the configuration of Llama-2-7B, a folder of tests."""
    for place in ("path/of/my/model", "path/of/the/base"):
        tiny_llama().save_pretrained(folder / place)
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder / "path/of")
    save_adapter(folder / "adapters/law", a_config())
    save_adapter(folder / "DIR/law", a_config())
    of_a_run = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    save_adapter(folder / "runs/checkpoint-500", of_a_run)
    (folder / "configs").mkdir()
    (folder / "configs/lora.yaml").write_text(RECIPE)
    (folder / "examples").mkdir()
    (folder / "lora-baseline.json").write_text(to_json({}))


def save_adapter(folder: Path, config: LoraConfig) -> None:
    """Save an adapter with made-up values."""
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.peft_config["default"].base_model_name_or_path = "path/of/the/base"
    model.save_pretrained(folder, save_embedding_layers=False)
