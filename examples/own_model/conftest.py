"""Tests in this folder run on a model of their own: one fixture is overridden, nothing else changes."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="session")
def lora_base_model() -> GPT2LMHeadModel:
    """A small GPT-2; in a real suite ``AutoModelForCausalLM.from_pretrained(...)``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=320,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=257,
            eos_token_id=258,
        )
        return GPT2LMHeadModel(config)
