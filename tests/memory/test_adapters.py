"""What an adapter holds: its dtype counts everywhere, and what is frozen is not trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as variants
from transformers import BartConfig, LlamaConfig, LlamaForCausalLM, T5Config

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


def variant(field: str, **values: Any) -> LoraConfig:
    """A variant of LoRA on the queries and values of the base."""
    if field not in LoraConfig.__dataclass_fields__:
        pytest.skip(f"this PEFT has no {field}")
    classes = {
        "kasa_config": "KasaConfig",
        "use_bdlora": "BdLoraConfig",
        "monteclora_config": "MontecloraConfig",
        "velora_config": "VeloraConfig",
    }
    made = getattr(variants, classes[field])(**values)
    return LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **{field: made})


MODULES = 2 * 7
"""Adapted modules: queries and values in seven layers, each of 128 x 128."""
PLAIN = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def two(config: LoraConfig, **setting: Any) -> list[Any]:
    return [estimate_memory(c, BASE, batch_size=2, seq_len=32, **setting) for c in (PLAIN, config)]


@pytest.mark.parametrize("setting", [{}, {"gradient_checkpointing": True}])
def test_kasa_holds_a_diagonal_more_than_plain_lora(setting: dict[str, Any]) -> None:
    """The base weights that it cuts once, when they are loaded, are no part of a step."""
    plain, kasa = two(variant("kasa_config"), **setting)
    diagonals = 512 * MODULES  # 16 numbers in float32, and no tensor takes less than 512 bytes
    assert kasa.loaded - plain.loaded == diagonals
    assert kasa.after_step - plain.after_step == 3 * diagonals


def test_block_diagonal_factors_are_smaller_by_their_blocks() -> None:
    plain, blocks = two(
        variant("use_bdlora", target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=4)
    )
    saved = 4 * 16 * 128 * 3 // 4  # of one factor in each module
    assert plain.loaded - blocks.loaded == MODULES * saved


@pytest.mark.parametrize(("dtype", "noise"), [("bfloat16", 2), ("float32", 4)])
def test_monteclora_keeps_the_noise_of_many_steps(dtype: str, noise: int) -> None:
    plain, sampled = two(variant("monteclora_config", buffer_size=10, num_samples=4), dtype=dtype)
    kept = [10 * 4 * 128 * 16, 10 * 16 * 16, 10 * 4]  # z_mvn, z_wishart, z_dirichlet
    states = [16 * 16, 4]  # the prior of the variance, the weights of the samples
    held = sum(-(-numbers * noise // 512) * 512 for numbers in (*kept, *states))
    trained = 2 * 512  # 16 and 4 numbers in float32
    assert sampled.loaded - plain.loaded == MODULES * (held + trained)
    drawn = sampled.after_step - sampled.loaded - (plain.after_step - plain.loaded)
    assert drawn >= MODULES * 2 * trained, "the moments, and what a forward leaves on the sampler"


@pytest.mark.parametrize(
    "base",
    [
        T5Config(
            d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, vocab_size=512, decoder_start_token_id=0
        ),
        BartConfig(
            d_model=64,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            vocab_size=512,
        ),
    ],
    ids=["T5", "BART"],
)
def test_classifiers_that_count_their_ends_of_sequences_are_estimated(base: Any) -> None:
    config = LoraConfig(
        r=8,
        target_modules=["q", "v", "q_proj", "v_proj"],
        task_type="SEQ_CLS",
        modules_to_save=["classification_head"],
    )
    one, two = (estimate_memory(config, base, batch_size=2, seq_len=length) for length in (32, 64))
    assert one.peak_allocated < two.peak_allocated
