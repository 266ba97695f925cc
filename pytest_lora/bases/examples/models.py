"""Small bases and batches."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from pytest_lora.bases.examples.configs import CONFIGS, SIZES
from pytest_lora.bases.examples.configs import FUSED_BY_PEFT as FUSED_BY_PEFT
from pytest_lora.bases.examples.configs import LAYERS as LAYERS
from pytest_lora.bases.examples.configs import VOCABULARY as VOCABULARY
from pytest_lora.bases.examples.configs import WIDTH as WIDTH
from pytest_lora.bases.examples.configs import llama_config as llama_config
from pytest_lora.bases.examples.folders import save_adapter, scratch

BASE_FIELDS = {"num_hidden_layers", "hidden_size", "vocab_size"}
"""Fields of LlamaConfig that ``adapter`` takes in an example."""


def quantized(
    model: nn.Module, compute_dtype: torch.dtype = torch.float32, storage: torch.dtype = torch.uint8
) -> nn.Module:
    """The model with its linear layers, the head aside, packed to 4 bits in place."""
    bnb: Any = import_module("bitsandbytes")

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in ("lm_head", "score"):
            continue
        packed = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            quant_storage=storage,
        )
        packed.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", quant_storage=storage, module=packed
        )
        model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], packed.to("cpu"))
    vars(model)["is_loaded_in_4bit"] = True
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


PLACEHOLDER = 5
"""The image token of the bases that read images and text."""


def image_text_base() -> nn.Module:
    """A tiny LLaVA: four placeholders an image."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(), image_seq_length=4, vision_feature_layer=-1
    )
    config.image_token_id = PLACEHOLDER
    return LlavaForConditionalGeneration(config)


def image_text_batch(rows: int = 2) -> dict[str, torch.Tensor]:
    """Each row an image, whose placeholders are no targets, and a text."""
    return {**_with_placeholders(rows), "pixel_values": torch.randn(rows, 3, 16, 16)}


TAKES_TOKEN_TYPES = "mm_token_type_ids" in signature(Qwen2_5_VLForConditionalGeneration.forward).parameters
"""Whether this version of transformers asks for them."""


def grid_base() -> nn.Module:
    """A tiny Qwen2.5-VL: images of any size, told by their grid of patches."""
    vision = {
        "depth": LAYERS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "fullatt_block_indexes": [1],
        "window_size": 16,
    }
    text = {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=PLACEHOLDER,
            video_token_id=6,
            vision_start_token_id=7,
            vision_end_token_id=8,
        )
    )


def grid_batch(rows: int = 2) -> dict[str, torch.Tensor]:
    """Each row an image of four by four patches, which are four tokens, and a text."""
    batch = _with_placeholders(rows)
    types = {"mm_token_type_ids": (batch["input_ids"] == PLACEHOLDER).long()}
    return {
        **batch,
        **(types if TAKES_TOKEN_TYPES else {}),
        "pixel_values": torch.randn(16 * rows, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }


def _with_placeholders(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, VOCABULARY, (rows, 16))
    ids[:, 1:5] = PLACEHOLDER
    labels = ids.masked_fill(ids == PLACEHOLDER, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _classifier() -> nn.Module:
    build: Any = LlamaForSequenceClassification
    model: nn.Module = build(llama_config(num_labels=3))
    return model


BASES: dict[str, Callable[[], nn.Module]] = {
    "base": lambda: LlamaForCausalLM(llama_config()),
    "base_4bit": lambda: quantized(LlamaForCausalLM(llama_config())),
    "tied_base": lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)),
    "classifier_base": _classifier,
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
    "image_text_base": image_text_base,
    "grid_base": grid_base,
}

BATCHES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "batch": language_batch,
    "classifier_batch": classifier_batch,
    "image_batch": image_batch,
    "image_text_batch": image_text_batch,
    "grid_batch": grid_batch,
}


def made(name: str) -> Any:
    """A fresh base, batch or configuration, from a fixed seed; random states stay as they are.

    Raises:
        KeyError: There is none of this name.
    """
    build = {**BASES, **BATCHES, **CONFIGS}[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed CUDA too, now or later
        return build()


def adapter(on: nn.Module | None = None, *, folder: Path | None = None, **fields: Any) -> Path:
    """Save an adapter of a small base, as if it had been trained.

    Args:
        on: The base; by default a fresh ``base``.
        folder: Where to put its folder; by default one that is removed when the process ends.
        fields: Fields of ``LoraConfig``. Those of ``LlamaConfig`` in ``BASE_FIELDS`` make the base another.

    Returns:
        The adapter's folder.
    """
    changes = {name: fields.pop(name) for name in BASE_FIELDS & fields.keys()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        base = LlamaForCausalLM(llama_config(**changes)) if on is None else on
        return save_adapter(scratch() if folder is None else folder, base, **fields)
