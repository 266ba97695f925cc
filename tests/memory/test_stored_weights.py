"""Checkpoints that are stored quantized count as they are stored, by the sizes of their formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import FineGrainedFP8Config, LlamaConfig

from pytest_lora import estimate_memory
from pytest_lora.inspection.bitsandbytes_internals import pack_linear_layers

CONFIG = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
LAYERS, WIDTH, INNER = 7, 256, 512
MATRICES = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
"""Numbers in q, k, v, o, gate, up and down of all layers."""


def llama(**stored: Any) -> LlamaConfig:
    base = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=4,
        num_hidden_layers=LAYERS,
        vocab_size=512,
    )
    if stored:
        base.quantization_config = stored
    return base


def loaded(base: Any, **setting: Any) -> Any:
    return estimate_memory(CONFIG, base, **{"batch_size": 2, "seq_len": 64, **setting})


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GROUPS = LAYERS * (4 * 2 * WIDTH + 2 * 2 * INNER + 4 * WIDTH)
"""Pairs of 128 inputs and an output, in all layers."""
INDICES = LAYERS * (6 * WIDTH + INNER)
"""Inputs of all layers."""


@pytest.mark.parametrize(
    ("stored", "packed", "beside"),
    [
        (FP8, MATRICES, 4 * MATRICES // 128**2),
        (GPTQ, MATRICES // 2, GROUPS // 2 + 2 * GROUPS + 4 * INDICES),
        (AWQ, MATRICES // 2, GROUPS // 2 + 2 * GROUPS),
        (NF4, MATRICES // 2, None),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bytes_are_those_of_the_format(
    stored: dict[str, Any], packed: int, beside: int | None, checkpointing: bool
) -> None:
    estimate = loaded(llama(**stored), gradient_checkpointing=checkpointing)
    assert estimate.breakdown["quantized base weights"] == packed
    if beside is not None:
        found = estimate.breakdown["quantization statistics"]
        assert found == pytest.approx(beside, abs=512 * LAYERS * 7 * 3), "each rounded to 512 bytes"
        assert estimate.bound == "at most"
        assert "kernels of" in str(estimate)
    assert estimate.loaded < loaded(llama()).loaded


def test_what_is_given_in_bitsandbytes_is_what_is_declared() -> None:
    declared = loaded(llama(**{**NF4, "bnb_4bit_compute_dtype": "bfloat16"}))
    assert declared.peak_allocated == loaded(llama(), quantization="nf4").peak_allocated


@pytest.mark.skipif(
    not hasattr(FineGrainedFP8Config(), "dequantize"), reason="this version of transformers unpacks no FP8"
)
def test_what_is_unpacked_at_loading_is_whole() -> None:
    whole = loaded(llama())
    unpacked = loaded(llama(**FP8), quantization=FineGrainedFP8Config(dequantize=True))
    assert unpacked.peak_allocated == whole.peak_allocated
    assert unpacked.bound is None


def test_two_quantizations_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^quantization: the base is stored in fp8 already; leave "):
        loaded(llama(**FP8), quantization="nf4")


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match=r"^base: its weights are stored by 'hqq', which is not known here"):
        loaded(llama(quant_method="hqq"))


def test_fused_experts_in_mxfp4_are_four_bits_and_a_scale() -> None:
    base = transformers.GptOssConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        vocab_size=512,
        layer_types=["full_attention"] * 8,
    )
    experts = 8 * 4 * 3 * 128 * 128
    whole = {c: loaded(base, gradient_checkpointing=c) for c in (False, True)}
    base.quantization_config = {"quant_method": "mxfp4"}
    for checkpointing, before in whole.items():
        packed = loaded(base, gradient_checkpointing=checkpointing)
        assert packed.breakdown["quantized base weights"] == experts // 2
        assert before.loaded - packed.loaded == experts * 2 - experts // 2 - experts // 32
        kept = packed.breakdown["activations"] - before.breakdown["activations"]
        assert kept < 2.1 * experts * 2 / 8, "no more than a layer's experts are whole at once"


def test_a_live_model_in_four_bits_is_counted_so() -> None:
    model = transformers.LlamaForCausalLM(llama()).to(torch.bfloat16)
    pack_linear_layers(model)
    live, described = loaded(model), loaded(llama(), quantization="nf4")
    assert live.breakdown["quantized base weights"] == described.breakdown["quantized base weights"]
