"""A healthy adapter, and five classic mistakes, which fail as they should; ``pytest --lora-demo`` runs this file."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig

from pytest_lora import Expect, assert_config_healthy, assert_lora_healthy

LLAMA_2_7B = LlamaConfig()
"""The configuration alone: no weights are needed to judge what an adapter would be on them."""


def test_healthy_adapter(lora_model: PeftModel) -> None:
    """A small pretrained base in 4 bits with a fresh adapter on it."""
    assert_lora_healthy(lora_model)


def test_half_of_the_targets_match_nothing() -> None:
    """Names of another model family. PEFT drops them without a word as long as one of them matches."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "query_key_value", "dense"])
    assert_config_healthy(config, LLAMA_2_7B)


def test_alpha_was_left_over_from_another_rank() -> None:
    """alpha=16 was right for r=8. At r=64 the same adapter learns at an eighth of the rate."""
    config = LoraConfig(r=64, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    assert_config_healthy(config, LLAMA_2_7B, expect=Expect(alpha_ratio=2.0))


def test_the_adapter_was_frozen(lora_model: PeftModel) -> None:
    """The base is prepared after the adapter was put on, which freezes the adapter too."""
    prepare: Any = peft.prepare_model_for_kbit_training
    prepare(lora_model, use_gradient_checkpointing=False)
    assert_lora_healthy(lora_model)


@pytest.mark.filterwarnings("error::pytest_lora.LoraHealthWarning")
def test_the_percentage_counts_packed_weights(lora_model: PeftModel) -> None:
    """In 4 bits one stored byte is two weights: numel() halves the total."""
    trainable = sum(p.numel() for p in lora_model.parameters() if p.requires_grad)
    printed = 100 * trainable / sum(p.numel() for p in lora_model.parameters())
    assert_lora_healthy(lora_model, expect=Expect(reported_percent=printed))


def test_the_loaded_adapter_holds_nothing(lora_model: PeftModel) -> None:
    """A file whose keys do not fit loads as nothing: lora_B stays at its initial zero."""
    assert_lora_healthy(lora_model, expect=Expect(fresh=False))
