"""A live model inside DDP, FSDP or ``torch.compile`` is estimated as what it wraps, and the figures are a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_lora import estimate_memory
from pytest_lora.memory.estimate import estimate_of_model

BASE = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=6, vocab_size=128
)
CONFIG = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
BATCH = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model: Any) -> Any:
    return fully_shard(model)


WRAPPERS: list[tuple[Callable[[Any], Any], str, str]] = [
    (DistributedDataParallel, "at least", "DistributedDataParallel"),
    (sharded, "at most", "FSDP"),
    (torch.compile, "at most", "torch.compile"),
]


@pytest.mark.parametrize(("wrap", "bound", "name"), WRAPPERS, ids=["ddp", "fsdp", "compile"])
def test_a_wrapped_model_says_what_is_not_counted(wrap: Callable[[Any], Any], bound: str, name: str) -> None:
    plain = estimate_memory(CONFIG, LlamaForCausalLM(BASE), batch_size=2, seq_len=8)
    wrapped = estimate_memory(CONFIG, wrap(LlamaForCausalLM(BASE)), batch_size=2, seq_len=8)
    assert plain.bound is None
    assert (wrapped.bound, wrapped.peak_allocated) == (bound, plain.peak_allocated)
    assert wrapped.architecture == "LlamaForCausalLM"
    assert name in str(wrapped)

    adapted = estimate_of_model(wrap(get_peft_model(LlamaForCausalLM(BASE), CONFIG)), BATCH)
    assert adapted is not None
    assert adapted.bound == bound
