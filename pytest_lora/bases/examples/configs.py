"""Configurations of bases: small ones, and some of full size that are never given weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from packaging.version import Version
from transformers import GptOssConfig, LlamaConfig, PretrainedConfig
from transformers import __version__ as version

LAYERS = 2
WIDTH = 64
VOCABULARY = 128


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of the small decoders."""


def llama_config(**changes: Any) -> LlamaConfig:
    """A small Llama; ``changes`` are other fields."""
    fields: dict[str, Any] = {
        **SIZES,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **changes,
    }
    return LlamaConfig(**fields)


def _llama_in_gptq() -> PretrainedConfig:
    """Llama-2-7B as its quantized checkpoints describe themselves."""
    config = LlamaConfig()
    vars(config)["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    return config


FUSED_BY_PEFT = find_spec("peft.utils.transformers_weight_conversion") is not None and Version(
    version
) >= Version("5")
"""Whether this PEFT takes names of modules for the parameters that this transformers has fused experts into."""


def _shared_experts() -> PretrainedConfig:
    """A small DeepSeek-V3: a dense layer, then one of routed experts and a shared one."""
    from transformers import DeepseekV3Config  # examples of one rule need it, and older versions lack it

    return DeepseekV3Config(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        vocab_size=VOCABULARY,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "shared_experts": _shared_experts,
    "llama_7b": LlamaConfig,  # its defaults are Llama-2-7B
    "gptq_7b": _llama_in_gptq,
    "fused_moe": lambda: GptOssConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=1000,
    ),
}
