"""What the ranks of test_parallel.py do: a sharded step on the CPU, followed as the prediction follows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.bitsandbytes_internals import quantization_statistics
from pytest_lora.inspection.memory.meta_answers import StandIns
from pytest_lora.inspection.memory.parallel.dtensors import as_accelerator
from pytest_lora.inspection.memory.parallel.model import local
from pytest_lora.inspection.memory.parallel.ranks import resizes_followed
from pytest_lora.inspection.memory.storage_tracker import StorageTracker

BATCH, LENGTH, RANKS = 3, 48, 2
STEPS = 6
"""The first sets up what stays; in single ones of the others, a buffer that gloo's own thread holds goes later."""


def base() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=6,
        vocab_size=300,
        pad_token_id=0,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )


def adapter() -> LoraConfig:
    return LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def model() -> Any:
    torch.manual_seed(0)
    made = get_peft_model(LlamaForCausalLM(base()), adapter())
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.train()


def batch(rank: int) -> torch.Tensor:
    return torch.randint(4, 300, (BATCH, LENGTH), generator=torch.Generator().manual_seed(rank))


def sharded(made: Any) -> Any:
    setting = StepSetting(BATCH, LENGTH, dtype="float32")
    accelerator: SimpleNamespace = as_accelerator(setting, Parallel(RANKS, "fsdp2"))
    return fsdp2_prepare_model(accelerator, made)


def peak_of(tracker: StorageTracker) -> int:
    live = peak = 0
    for event in tracker.events:
        live += tracker.sizes[event] if event >= 0 else -tracker.sizes[~event]
        peak = max(peak, live)
    return peak


def really_allocated() -> dict[str, int]:
    """Bytes of a rank: held before the step, added at its peak, and of the optimizer."""
    prepared = sharded(model())
    optimizer = torch.optim.AdamW([p for p in prepared.parameters() if p.requires_grad], foreach=False)
    ids = batch(dist.get_rank())
    peaks = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        tracker = StorageTracker(None, StandIns(padded=False, experts=None), device=torch.device("cpu"))
        held = [local(t) for t in (*prepared.parameters(), *prepared.buffers(), ids)]
        for tensor in held:
            tracker.ignore(tensor)
        with tracker.recorded(), resizes_followed(tracker):
            prepared(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        peaks.append(peak_of(tracker))
    states = [local(v) for state in optimizer.state.values() for v in state.values() if v.dim()]
    storages = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in held[:-1]}
    return {
        "held": sum(storages.values()),
        "added": min(peaks),
        "optimizer": sum(t.untyped_storage().nbytes() for t in states),
    }


def trained(made: Any, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter after two steps, whole."""
    weights = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (sum(made(input_ids=ids, labels=ids).loss for ids in batches) / len(batches)).backward()
        optimizer.step()
    named = {n: p for n, p in made.named_parameters() if p.requires_grad}
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in named.items()}


def packed_model() -> Any:
    """A QLoRA whose packed weights FSDP can divide: they are stored as floats."""
    import bitsandbytes as bnb

    made = LlamaForCausalLM(base())
    torch.manual_seed(0)
    for name, layer in list(made.named_modules()):
        if name.endswith(("_proj",)):
            packed = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=torch.float32,
                quant_storage=torch.float32,
            )
            weight = torch.empty(layer.weight.shape).normal_(std=0.05)
            packed.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", quant_storage=torch.float32, module=packed
            )
            made.set_submodule(name, packed.to("cpu"))
    assert quantization_statistics(made.model.layers[0].self_attn.q_proj.weight)
    torch.manual_seed(0)
    adapted = get_peft_model(made, adapter())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "lora_" not in name and parameter.dim() > 1 and not hasattr(parameter, "quant_state"):
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted.train()


def trained_in_shards() -> dict[str, torch.Tensor]:
    made = packed_model()
    whole = sum(p.numel() for p in made.parameters())
    prepared = sharded(made)
    held = sum(local(p).numel() for p in prepared.parameters())
    assert held <= whole // RANKS + 100, "weights are divided"
    return trained(prepared, [batch(dist.get_rank())])


def measured_and_trained() -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    return really_allocated(), trained_in_shards()
