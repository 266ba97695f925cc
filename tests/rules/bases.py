"""Small bases and batches under the names that the examples in rule documentation use."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
)

import pytest_lora
from tests.rules import folders

LAYERS = 2
WIDTH = 64
VOCABULARY = 128

BASE_FIELDS = {"num_hidden_layers", "hidden_size", "vocab_size"}
"""Fields of LlamaConfig that ``adapter`` takes in an example."""


def _llama_config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **changes,
    }
    return LlamaConfig(**fields)


def quantized(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with its linear layers, the head aside, packed to 4 bits in place."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in ("lm_head", "score"):
            continue
        packed = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=compute_dtype, quant_type="nf4"
        )
        packed.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", module=packed
        )
        model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], packed.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


class VisionLanguageModel(nn.Module):
    """A vision tower and a language model whose attention projections share their names."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in ("q_proj", "v_proj")})
        self.language_model = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in ("q_proj", "v_proj")})


class FusedExperts(nn.Module):
    """A router over experts whose weights are one stacked parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 16)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(16, WIDTH, 2 * WIDTH))
        self.experts.down = nn.Parameter(torch.randn(16, 2 * WIDTH, WIDTH))


class BatchNormBase(nn.Module):
    """A small network for images with a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.relu(self.norm(self.conv(pixel_values))).mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def language_batch(rows: int = 4, length: int = 16) -> dict[str, torch.Tensor]:
    """Random tokens, none of them special, which are their own labels."""
    ids = torch.randint(3, VOCABULARY, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def classifier_batch(rows: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
    """Random tokens, each row with one of three classes."""
    return {**language_batch(rows, length), "labels": torch.randint(0, 3, (rows,))}


def image_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Random images, each with one of four classes."""
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.randint(0, 4, (rows,))}


BASES: dict[str, Callable[[], nn.Module]] = {
    "base": lambda: LlamaForCausalLM(_llama_config()),
    "base_4bit": lambda: quantized(LlamaForCausalLM(_llama_config())),
    "tied_base": lambda: LlamaForCausalLM(_llama_config(tie_word_embeddings=True)),
    "classifier_base": lambda: LlamaForSequenceClassification(_llama_config(num_labels=3)),
    "moe_base": lambda: MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ),
    "gpt2_base": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64)
    ),
    "fused_moe_base": lambda: nn.Sequential(FusedExperts()),
    "vision_language_base": VisionLanguageModel,
    "torch_attention_base": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True),
    "batchnorm_base": BatchNormBase,
}

BATCHES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "batch": language_batch,
    "classifier_batch": classifier_batch,
    "image_batch": image_batch,
}


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama_7b": LlamaConfig,  # its defaults are Llama-2-7B
    "gptq_7b": lambda: LlamaConfig(
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}
    ),
    "fused_moe": lambda: GptOssConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=1000,
    ),
}


@cache
def names() -> dict[str, Any]:
    """What an example may use besides the bases: torch, PEFT and this package."""
    found: dict[str, Any] = {"torch": torch, "nn": nn}
    found.update({n: getattr(peft, n) for n in ("LoraConfig", "PeftModel", "get_peft_model")})
    found.update({n: getattr(pytest_lora, n) for n in pytest_lora.__all__})
    return found


class Namespace(dict[str, Any]):
    """Names for one example; a base or batch is built, from a fixed seed, when it is first mentioned."""

    def __init__(self, scratch: Path) -> None:
        super().__init__()
        self.scratch = scratch

    def adapter(self, on: nn.Module | None = None, **fields: Any) -> Path:
        """Folder of a saved adapter; fields of LlamaConfig among the others make it one of another base."""
        changes = {name: fields.pop(name) for name in BASE_FIELDS & fields.keys()}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = LlamaForCausalLM(_llama_config(**changes)) if on is None else on
            return folders.adapter(self.scratch, base, **fields)

    def __missing__(self, name: str) -> Any:
        if name == "adapter":
            return self.adapter
        if name in folders.__all__:
            return getattr(folders, name)
        made = {**BASES, **BATCHES, **CONFIGS}
        if name in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self[name] = made[name]()
            return self[name]
        if name in names():
            return names()[name]
        raise KeyError(name)


def run(code: str) -> pytest_lora.Report:
    """Run an example and hand back the report that it made."""
    with tempfile.TemporaryDirectory() as scratch:
        namespace = Namespace(Path(scratch))
        exec(compile(code, "<example>", "exec"), namespace)
    report = namespace["report"]
    assert isinstance(report, pytest_lora.Report)
    return report
