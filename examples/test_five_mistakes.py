"""Five classic mistakes, each found in seconds and without training, and what the report says, word for word.

The mistakes themselves are the tests of ``pytest --lora-demo``, in pytest_lora/plugin/demo/test_demo.py, which fail.
"""

from __future__ import annotations

import pytest
from peft import PeftModel

from pytest_lora import LoraHealthError, LoraHealthWarning
from pytest_lora.plugin.demo import test_demo as mistakes


def test_half_of_the_targets_match_nothing() -> None:
    with pytest.raises(LoraHealthError) as failure:
        mistakes.test_half_of_the_targets_match_nothing()
    assert str(failure.value) == (
        "LORA104: LoraConfig on LlamaForCausalLM: 1 error\n"
        "\n"
        "error[LORA104]: target matches nothing\n"
        "  --> target_modules on LlamaForCausalLM\n"
        "  observed: no module of the base matches ['dense', 'query_key_value']; 2 of 4 names match\n"
        "  expected: every name to match at least one module\n"
        "  fix:      drop the name: target_modules=['q_proj', 'v_proj']; or use names of this model: down_proj, "
        "gate_proj, k_proj, lm_head, o_proj, up_proj"
    )


def test_alpha_was_left_over_from_another_rank() -> None:
    with pytest.raises(LoraHealthError) as failure:
        mistakes.test_alpha_was_left_over_from_another_rank()
    assert str(failure.value) == (
        "LORA127: LoraConfig on LlamaForCausalLM: 1 error\n"
        "\n"
        "error[LORA127]: scaling differs from expected\n"
        "  --> 64 modules: model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj\n"
        "  observed: r=64 with alpha=16: the scaling is 0.25\n"
        "  expected: a scaling of 2\n"
        "  fix:      set lora_alpha=128"
    )


def test_the_adapter_was_frozen(lora_model: PeftModel) -> None:
    with pytest.raises(LoraHealthError) as failure:
        mistakes.test_the_adapter_was_frozen(lora_model)
    (error,) = failure.value.report.errors
    assert error.code == "LORA201"
    assert error.observed == "all 35 LoRA layers are frozen (requires_grad=False); trainable: nothing"
    assert error.fix == (
        "freeze or prepare_model_for_kbit_training the base before get_peft_model, not after; "
        "here model.set_adapter('default') makes the adapter trainable again"
    )


def test_the_percentage_counts_packed_weights(lora_model: PeftModel) -> None:
    with pytest.warns(LoraHealthWarning) as warned:
        mistakes.test_the_percentage_counts_packed_weights(lora_model)
    assert str(warned[0].message) == (
        "warning[LORA218]: reported percent is wrong\n"
        "  --> reported_percent of LlamaForCausalLM\n"
        "  observed: 14.4734 % trainable is reported; it counts packed 4-bit storage (672,128 stored numbers, two "
        "weights in a byte)\n"
        "  expected: 8.35992 %: 97,280 trainable of 1,163,648 parameters\n"
        "  fix:      count with pytest_lora, percent = count_parameters(model).percent, not with numel"
    )


def test_the_loaded_adapter_holds_nothing(lora_model: PeftModel) -> None:
    with pytest.raises(LoraHealthError) as failure:
        mistakes.test_the_loaded_adapter_holds_nothing(lora_model)
    (error,) = failure.value.report.errors
    assert error.code == "LORA225"
    assert error.observed == "lora_B is all zero in 35 of 35 modules of 'default'"
