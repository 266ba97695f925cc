"""Five classic mistakes, each found in seconds and without training, and what the report says, word for word."""

from __future__ import annotations

import pytest
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import LlamaConfig

from pytest_lora import (
    Expect,
    LoraHealthError,
    LoraHealthWarning,
    assert_config_healthy,
    assert_lora_healthy,
)

LLAMA_2_7B = LlamaConfig()
"""The configuration alone: no weights are needed to judge what an adapter would be on them."""


def test_half_of_the_targets_match_nothing() -> None:
    """Names of another model family. PEFT drops them without a word as long as one of them matches."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "query_key_value", "dense"])
    with pytest.raises(LoraHealthError) as failure:
        assert_config_healthy(config, LLAMA_2_7B)
    assert str(failure.value) == (
        "LoraConfig on LlamaForCausalLM: 1 error\n"
        "\n"
        "error[LORA104]: target matches nothing\n"
        "  --> target_modules on LlamaForCausalLM\n"
        "  observed: no module of the base matches ['dense', 'query_key_value']; 2 of 4 names match\n"
        "  expected: every name to match at least one module\n"
        "  fix:      drop the name, or use those of this model: down_proj, gate_proj, k_proj, lm_head, o_proj, "
        "q_proj, up_proj, v_proj"
    )


def test_alpha_was_left_over_from_another_rank() -> None:
    """alpha=16 was right for r=8. At r=64 the same adapter learns at an eighth of the rate."""
    config = LoraConfig(r=64, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    with pytest.raises(LoraHealthError) as failure:
        assert_config_healthy(config, LLAMA_2_7B, expect=Expect(alpha_ratio=2.0))
    assert str(failure.value) == (
        "LoraConfig on LlamaForCausalLM: 1 error\n"
        "\n"
        "error[LORA127]: scaling differs from expected\n"
        "  --> 64 modules: model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj\n"
        "  observed: r=64 with alpha=16: the scaling is 0.25\n"
        "  expected: a scaling of 2\n"
        "  fix:      set lora_alpha=128"
    )


def test_the_adapter_was_frozen(lora_model: PeftModel) -> None:
    """The base is prepared after the adapter was put on, which freezes the adapter too."""
    prepare_model_for_kbit_training(lora_model, use_gradient_checkpointing=False)
    with pytest.raises(LoraHealthError) as failure:
        assert_lora_healthy(lora_model)
    (error,) = failure.value.report.errors
    assert error.code == "LORA201"
    assert error.observed == "all 35 LoRA layers are frozen (requires_grad=False); trainable: nothing"
    assert error.fix == (
        "freeze or prepare_model_for_kbit_training the base before get_peft_model, not after; "
        "here model.set_adapter('default') makes the adapter trainable again"
    )


def test_the_percentage_counts_packed_weights(lora_model: PeftModel) -> None:
    """In 4 bits one stored byte is two weights: numel() halves the total."""
    trainable = sum(p.numel() for p in lora_model.parameters() if p.requires_grad)
    printed = 100 * trainable / sum(p.numel() for p in lora_model.parameters())
    with pytest.warns(LoraHealthWarning) as warned:
        assert_lora_healthy(lora_model, expect=Expect(reported_percent=printed))
    assert str(warned[0].message) == (
        "warning[LORA218]: reported percent is wrong\n"
        "  --> reported_percent of LlamaForCausalLM\n"
        "  observed: 14.4734 % trainable is reported; it counts packed 4-bit storage (672,128 stored numbers, two "
        "weights in a byte)\n"
        "  expected: 8.35992 %: 97,280 trainable of 1,163,648 parameters\n"
        "  fix:      count with pytest_lora.count_parameters(model) or model.get_nb_trainable_parameters(), not with "
        "numel()"
    )


def test_the_loaded_adapter_holds_nothing(lora_model: PeftModel) -> None:
    """A file whose keys do not fit loads as nothing: lora_B stays at its initial zero."""
    with pytest.raises(LoraHealthError) as failure:
        assert_lora_healthy(lora_model, expect=Expect(fresh=False))
    (error,) = failure.value.report.errors
    assert error.code == "LORA225"
    assert error.observed == "lora_B is all zero in 35 of 35 modules of 'default'"
