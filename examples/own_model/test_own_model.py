"""The fixtures and assertions on a model that the user brings; see conftest.py beside this file."""

from __future__ import annotations

import pytest
from peft import PeftModel
from torch import Tensor, nn

from pytest_lora import assert_lora_healthy


@pytest.mark.lora(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
def test_own_model(lora_model: PeftModel, lora_batch: dict[str, Tensor]) -> None:
    assert_lora_healthy(lora_model)
    loss = lora_model(**lora_batch).loss
    loss.backward()
    assert all(p.grad is not None for p in lora_model.parameters() if p.requires_grad)


def test_the_next_test_gets_the_same_base(lora_base_model: nn.Module) -> None:
    assert not any("lora_" in name for name, _ in lora_base_model.named_parameters())
