"""What an adapter holds: its dtype counts everywhere, and what is frozen is not trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_lora import estimate_memory
from pytest_lora.memory.estimate import estimate_of_model

BASE = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=7, vocab_size=512
)
CONFIG = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
FACTORS = 7 * 16 * (4 * (128 + 128) + 3 * (128 + 256))
"""Numbers of the factors: q, k, v, o of 128 x 128, gate, up and down of 128 x 256, in seven layers."""


def estimate(**setting: Any) -> Any:
    return estimate_memory(CONFIG, BASE, batch_size=2, seq_len=32, **setting)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_adapter_in_bfloat16_takes_half(quantization: str | None) -> None:
    whole, half = (estimate(adapter_dtype=d, quantization=quantization) for d in ("float32", "bfloat16"))
    assert whole.loaded - half.loaded == 2 * FACTORS
    assert whole.after_step - half.after_step == 3 * 2 * FACTORS, "the weights and both moments of AdamW"


@pytest.mark.parametrize("setting", [{"frozen": ["lora_A"]}, {"optimizer": "lorafa"}])
def test_frozen_factors_have_neither_gradients_nor_moments(setting: dict[str, Any]) -> None:
    all_trained, frozen = estimate(), estimate(**setting)
    assert frozen.loaded == all_trained.loaded
    saved = all_trained.after_step - frozen.after_step
    assert saved == 2 * 4 * 7 * 16 * (6 * 128 + 256), "two moments of every A"


def test_a_live_model_is_estimated_with_what_it_trains() -> None:
    base = copy.deepcopy(BASE)
    base.num_hidden_layers = 3  # the layers of a live model are traced one by one
    model = get_peft_model(LlamaForCausalLM(base).to(torch.bfloat16), CONFIG)
    batch = {"input_ids": torch.zeros(2, 32, dtype=torch.long)}
    trained = estimate_of_model(model, batch)
    one = "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"
    for name, parameter in model.named_parameters():
        if name == one:
            parameter.requires_grad_(False)
    one_frozen = estimate_of_model(model, batch)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    all_frozen = estimate_of_model(model, batch)
    assert trained is not None
    assert one_frozen is not None
    assert all_frozen is not None
    assert trained.after_step - one_frozen.after_step == 2 * 4 * 16 * 256
    assert trained.after_step - all_frozen.after_step == 2 * 4 * 3 * 16 * (6 * 128 + 256)


@pytest.mark.skipif(
    "alora_invocation_tokens" not in LoraConfig.__dataclass_fields__, reason="this PEFT has no activated LoRA"
)
def test_an_activated_adapter_is_estimated_as_a_plain_one() -> None:
    """Which tokens it leaves alone is in their values."""
    config = LoraConfig(
        r=16, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]
    )
    found = estimate_memory(config, BASE, batch_size=2, seq_len=32)
    assert found.bound == "about"
    assert (found.loaded, found.after_step) == (estimate().loaded, estimate().after_step)
    assert not estimate().unmodelled
