"""What an estimate leaves out, and says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from pytest_lora.facts.memory import StepSetting, Unmodelled
from pytest_lora.facts.memory_choices import FSDP
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.inspection.memory.batches import reads_images
from pytest_lora.inspection.memory.parallel.placed import moved_between_gpus
from pytest_lora.inspection.transformers_internals import runs_images_without_values

if TYPE_CHECKING:
    from peft import LoraConfig

_IN_FLOAT32 = 2
"""Bytes of a number in float32 for each in the smallest dtype of adapters, which are 16 bits."""


def of_adapter(config: LoraConfig) -> Iterator[Unmodelled]:
    if getattr(config, "alora_invocation_tokens", None):
        yield Unmodelled("that an activated LoRA leaves the tokens before its invocation alone is", "at most")
        yield Unmodelled("copies of the tokens after it are", "at least")


def of_setting(setting: StepSetting, model: nn.Module, breakdown: Mapping[str, int]) -> Iterator[Unmodelled]:
    asked: dict[str, Any] = dict(setting.args)
    if setting.images and reads_images(model) and not runs_images_without_values():
        yield Unmodelled(
            "images, which transformers 4 compares with the text by their values, are", "at least"
        )
    if asked.get("activation_offloading"):
        yield Unmodelled("activations that are moved to the host are", "at most")
    if setting.kernels == "liger":
        yield Unmodelled("that Liger rotates queries and keys in place is", "at most")
    evaluation = setting.evaluation
    held = evaluation is not None and evaluation.keeps != "loss" and setting.trainer != "trl-grpo"
    if evaluation is not None and held and evaluation.batches is None:
        yield Unmodelled(
            f"{evaluation.keeps} of further batches of the evaluation, which stay on the GPU without "
            "eval_accumulation_steps, are",
            "at least",
        )
    if setting.trainer == "trl-grpo":
        yield from _generation(asked, getattr(model, "config", None), setting)
    shared = setting.parallel
    if shared is not None and shared.strategy in FSDP and setting.accumulation > 1:
        # Every trained parameter is an adapter here; FSDP keeps a gradient in float32 at most.
        kept = _IN_FLOAT32 * (shared.shard_size or shared.gpus) * breakdown.get("adapters", 0)
        yield Unmodelled("gradients that no_sync keeps whole between micro-batches are", "at least", kept)
    if shared is not None and shared.strategy == "device_map":
        moved = moved_between_gpus(getattr(model, "config", None), setting)
        yield Unmodelled(
            "hidden states and logits that accelerate copies to another GPU are", "at least", moved
        )
    packed = setting.quantization
    if packed is not None and not packed.by_bitsandbytes:
        yield Unmodelled(f"kernels of {packed.method} that unpack a weight in parts are", "at most")
    if packed is not None and packed.method == "mxfp4":
        yield Unmodelled(
            "that transformers trains mxfp4 only with Mxfp4Config(dequantize=True) is", "at least"
        )


def _generation(asked: Mapping[str, Any], config: Any, setting: StepSetting) -> Iterator[Unmodelled]:
    """What generates completions for GRPO: the model itself between steps, vLLM beside it, or a server elsewhere."""
    if asked.get("use_vllm"):
        if asked.get("vllm_mode") != "server":
            share = asked.get("vllm_gpu_memory_utilization")
            words = f", which is given {100 * share:g} % of the GPU," if share else ""
            yield Unmodelled(f"vLLM on the same GPU{words} is", "at least")
        return
    batches = asked.get("steps_per_generation") or setting.accumulation
    cache = batches * _cache_of_generation(config, setting)
    words = f", whose keys and values take {format_bytes(cache)} or more beside the weights," if cache else ""
    yield Unmodelled(f"generation{words} is", "at least")


def _cache_of_generation(config: Any, setting: StepSetting) -> int:
    """Bytes of keys and values of a batch of sequences, two bytes a number; 0 where they are not known."""
    text = getattr(config, "text_config", config)
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(text, "hidden_size", None)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int)):
        return 0
    groups: int = getattr(text, "num_key_value_heads", None) or heads
    each: int = getattr(text, "head_dim", None) or width // heads
    return 2 * 2 * layers * groups * each * setting.batch_size * setting.seq_len
