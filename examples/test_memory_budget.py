"""Will a 70B QLoRA step fit on 24, 48 or 80 GiB? Answered in seconds, without a weight and without a GPU.

pytest examples/test_memory_budget.py -s
"""

from __future__ import annotations

import pytest
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig

from pytest_lora import LoraHealthError, assert_fits_memory, estimate_memory, largest_that_fits

LLAMA_2_70B = LlamaConfig(  # the path of a config.json does as well
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
)
CONFIG = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
QLORA = {
    "quantization": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    ),
    "gradient_checkpointing": True,
}


def test_what_fills_the_memory() -> None:
    estimate = estimate_memory(CONFIG, LLAMA_2_70B, batch_size=4, seq_len=1024, **QLORA)
    print(f"\n{estimate}")

    assert max(estimate.breakdown, key=lambda name: estimate.breakdown[name]) == "quantized base weights"
    assert 40 < estimate.peak_allocated / 2**30 < 60


def test_it_fits_on_80_gib() -> None:
    assert_fits_memory(LLAMA_2_70B, CONFIG, batch_size=4, seq_len=1024, budget="80GiB", **QLORA)


def test_on_48_gib_the_batch_has_to_shrink() -> None:
    with pytest.raises(LoraHealthError) as refused:
        assert_fits_memory(LLAMA_2_70B, CONFIG, batch_size=4, seq_len=1024, budget="48GiB", **QLORA)
    print(f"\n{refused.value}")

    assert "error[LORA502]: step does not fit" in str(refused.value)
    tokens = largest_that_fits(
        CONFIG, LLAMA_2_70B, "47GiB", vary="seq_len", batch_size=1, optimizer="adamw_8bit", **QLORA
    )
    assert 512 < tokens < 16384


def test_on_24_gib_not_even_the_weights_fit() -> None:
    with pytest.raises(LoraHealthError) as refused:
        assert_fits_memory(LLAMA_2_70B, CONFIG, batch_size=1, seq_len=128, budget="24GiB", **QLORA)
    print(f"\n{refused.value}")

    assert "error[LORA501]: weights do not fit" in str(refused.value)
    assert "none of the changes tried is enough" in str(refused.value)
