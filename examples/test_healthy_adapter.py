"""A real 4-bit base with a LoRA adapter, checked in one line; nothing is downloaded.

``lora_model`` is a small pretrained causal LM in 4 bits (bitsandbytes, nf4) with a fresh adapter on it. Fields of
``peft.LoraConfig`` come by marker; a mark on a module or a class works for all its tests.
"""

from __future__ import annotations

import pytest
from peft import LoraConfig, PeftModel

from pytest_lora import Expect, assert_lora_healthy, count_parameters


def test_adapter(lora_model: PeftModel) -> None:
    report = assert_lora_healthy(lora_model)
    assert not report.findings


@pytest.mark.lora(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
def test_attention_alone(lora_model: PeftModel) -> None:
    assert_lora_healthy(lora_model, expect=Expect(alpha_ratio=2.0))


@pytest.mark.parametrize("lora_config", [4, 8, 16], indirect=True)
def test_every_rank(lora_model: PeftModel, lora_config: LoraConfig) -> None:
    assert_lora_healthy(lora_model, expect=Expect(config=lora_config))


def test_parameters_are_counted_as_what_they_stand_for(lora_model: PeftModel) -> None:
    counted = count_parameters(lora_model)
    print(counted)
    assert counted.base == 1_066_368  # not the half of it that packed 4-bit storage shows
    assert counted.stored < counted.total
