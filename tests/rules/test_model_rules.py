"""Rules on live models beyond their own examples: further faults, unusual healthy models, and their laws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from pytest_lora import Expect, check_model
from pytest_lora.bases.examples.models import BASES, LAYERS, VOCABULARY, WIDTH
from pytest_lora.facts.base import BaseModule, Quantization
from pytest_lora.facts.model import ModelFacts, TrainableBase
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.inspection.model import model_facts
from pytest_lora.inspection.transformers_internals import TIES_WHAT_DIFFERS
from pytest_lora.rules import catalogue

RULES = {rule.name: rule for rule in catalogue()}
Case = tuple[nn.Module, Expect]
IDS = torch.arange(16).reshape(2, 8) + 3


def config(**changes: Any) -> LoraConfig:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    return LoraConfig(**fields)


def adapted(base: str | nn.Module = "base", **changes: Any) -> Any:
    model = BASES[base]() if isinstance(base, str) else base
    return get_peft_model(model, config(**changes))


def layers_of(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def train_b(model: nn.Module, value: float = 0.01) -> None:
    """Make an adapter look trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.fill_(value)


def set_trainable(model: nn.Module, part: str, value: bool) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(value)


# ------------------------------------------------------------------------------------------------ faults


def prepared_after_wrapping() -> Case:
    model = adapted("base_4bit")
    prepare_model_for_kbit_training(model)
    return model, Expect()


def loaded_without_is_trainable(tmp: Path) -> Case:
    adapted().save_pretrained(str(tmp))
    return PeftModel.from_pretrained(BASES["base"](), str(tmp)), Expect()


def only_the_head_trains() -> Case:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    set_trainable(model, "lora_", False)
    return model, Expect()


def one_layer_disabled() -> Case:
    model = adapted()
    layer = layers_of(model)[0]
    layer.enable_adapters(False)
    set_trainable(model, "lora_", True)
    return model, Expect()


def one_layer_left_merged() -> Case:
    model = adapted()
    layers_of(model)[2].merge()
    return model, Expect()


def norms_unfrozen() -> Case:
    model = adapted()
    set_trainable(model, "norm", True)
    return model, Expect()


def own_head_left_out_of_the_configuration() -> Case:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = BASES["base"]()
            self.own_head = nn.Linear(VOCABULARY, 3)

    model = adapted(Classifier())
    set_trainable(model, "own_head", True)
    return model, Expect()


def three_wrappers() -> Case:
    return adapted(adapted(adapted())), Expect()


def saved_head_in_float16() -> Case:
    return adapted(BASES["base"]().half(), modules_to_save=["lm_head"]), Expect()


def infinite_magnitude() -> Case:
    model = adapted(use_dora=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "magnitude" in n)[0] = float("inf")
    return model, Expect()


def nan_in_saved_head() -> Case:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "modules_to_save" in n).fill_(float("nan"))
    return model, Expect()


def nan_in_a_norm() -> Case:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "norm" in n)[3] = float("nan")
    return model, Expect()


def one_projection_frozen() -> Case:
    model = adapted()
    set_trainable(model, "q_proj", False)
    return model, Expect()


def token_rows_frozen() -> Case:
    model = adapted(trainable_token_indices=[5, 6])
    set_trainable(model, "trainable_tokens", False)
    return model, Expect()


def tied_head_saved_alone() -> Case:
    return adapted("tied_base", modules_to_save=["lm_head"]), Expect()


def merge_of_two_untied_copies() -> Case:
    return adapted("tied_base", modules_to_save=["lm_head", "embed_tokens"]), Expect(will_merge=True)


def second_transformers_adapter_not_chosen() -> Case:
    model = BASES["base"]()
    model.add_adapter(config(), adapter_name="first")
    model.add_adapter(config(), adapter_name="second")
    model.set_adapter("first")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in name)
    return model, Expect()


def trainable_adapter_loaded_but_not_chosen(tmp: Path) -> Case:
    adapted().save_pretrained(str(tmp))
    model = PeftModel.from_pretrained(BASES["base"](), str(tmp))
    model.load_adapter(str(tmp), adapter_name="ft", is_trainable=True)
    return model, Expect()


def nothing_active() -> Case:
    model = adapted()
    for layer in layers_of(model):
        layer.set_adapter([])
    return model, Expect()


def merged_and_unloaded_in_place() -> Case:
    model = adapted()
    model.merge_and_unload()
    return model, Expect()


def fraction_reported() -> Case:
    model = adapted()
    trainable, total = model.get_nb_trainable_parameters()
    return model, Expect(reported_percent=trainable / total)


def invented_percentage() -> Case:
    return adapted(), Expect(reported_percent=42.0)


def base_dropout_live_in_evaluation() -> Case:
    model = adapted("gpt2_base", target_modules=["c_attn"], fan_in_fan_out=True)
    return model.train(), Expect(purpose="eval")


def attention_dropout_live_at_inference() -> Case:
    model = adapted()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model.train(), Expect(purpose="inference")


def one_expert_kind_dequantized() -> Case:
    model = adapted("base_4bit")
    model.base_model.model.is_loaded_in_4bit = model.base_model.model.is_quantized = True
    model.base_model.model.model.layers[0].mlp.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
    set_trainable(model, "up_proj", False)
    return model, Expect()


def flagged_but_never_quantized() -> Case:
    model = BASES["base"]()
    model.is_loaded_in_8bit = True
    return adapted(model, target_modules=["embed_tokens"]), Expect()


def float16_compute_in_bfloat16() -> Case:
    model = adapted(BASES["base_4bit"]().to(torch.bfloat16))
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float16
    return model, Expect()


def b_frozen_at_zero() -> Case:
    model = adapted()
    set_trainable(model, "lora_B", False)
    return model, Expect()


def a_zeroed_and_frozen() -> Case:
    model = adapted()
    set_trainable(model, "lora_A", False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    return model, Expect()


def embedding_factor_frozen_at_zero() -> Case:
    model = adapted(target_modules=["embed_tokens"])
    set_trainable(model, "lora_embedding_A", False)
    return model, Expect()


def one_layer_not_loaded() -> Case:
    model = adapted()
    train_b(model)
    with torch.no_grad():
        layers_of(model)[1].lora_B["default"].weight.zero_()
    return model, Expect(fresh=False)


def half_the_layers_loaded() -> Case:
    model = adapted()
    train_b(model.base_model.model.model.layers[1])
    return model, Expect()


def fresh_one_was_trained() -> Case:
    model = adapted()
    train_b(model)
    return model, Expect(fresh=True)


def scaling_at_zero() -> Case:
    model = adapted()
    for layer in layers_of(model):
        layer.set_scale("default", 0.0)
    return model, Expect()


def scaled_layers_never_unscaled() -> Case:
    model = adapted(use_rslora=True)
    for layer in layers_of(model)[:2]:
        layer.scale_layer(0.3)
    return model, Expect()


def rank_edited_afterwards() -> Case:
    model = adapted()
    model.peft_config["default"].r = 32
    return model, Expect()


def head_replaced_afterwards() -> Case:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    model.base_model.model.score = nn.Linear(WIDTH, 5, bias=False).requires_grad_(False)
    return model, Expect()


def embedding_under_lora_grown() -> Case:
    model = adapted(target_modules=["embed_tokens"])
    wrapper = layers_of(model)[0]
    wrapper.base_layer = nn.Embedding(VOCABULARY + 8, WIDTH).requires_grad_(False)
    return model, Expect()


def factor_of_another_rank() -> Case:
    model = adapted()
    layers_of(model)[0].lora_A["default"] = nn.Linear(WIDTH, 4, bias=False)
    return model, Expect()


def checkpointing_by_torch_default() -> Case:
    base = BASES["base"]()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"preserve_rng_state": True})
    model = adapted(base)
    base.get_input_embeddings()._forward_hooks.clear()
    return model, Expect()


def checkpointing_with_only_the_head_outside() -> Case:
    base = BASES["base"]()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = adapted(base, modules_to_save=["lm_head"])
    base.get_input_embeddings()._forward_hooks.clear()
    return model, Expect()


def quantized_together_with_its_base() -> Case:
    model = adapted()
    for layer in layers_of(model):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            packed = torch.zeros(factor.weight.numel() // 2, 1, dtype=torch.uint8)
            factor.weight = nn.Parameter(packed, requires_grad=False)
    return model, Expect()


def added_to_a_frozen_one_and_not_chosen(tmp: Path) -> Case:
    adapted().save_pretrained(str(tmp))
    model = PeftModel.from_pretrained(BASES["base"](), str(tmp))
    model.add_adapter("fresh", config())
    return model, Expect()


def nan_under_four_bits() -> Case:
    base: Any = BASES["base_4bit"]()
    base.model.layers[0].mlp.up_proj.weight.quant_state.offset.fill_(float("nan"))
    return adapted(base), Expect()


def in_eight_bits(base: nn.Module, declare: bool = True) -> nn.Module:
    """The model with the linear layers of its second block packed to 8 bits in place."""
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and "layers.1" in name:
            packed = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False
            )
            packed.weight = bnb.nn.Int8Params(
                torch.randn(module.out_features, module.in_features).half(),
                requires_grad=False,
                has_fp16_weights=False,
            )
            base.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], packed.to("cpu"))
    return base


def one_block_in_eight_bits_instead_of_four() -> Case:
    return adapted(in_eight_bits(BASES["base_4bit"]())), Expect()


def eight_bits_called_four() -> Case:
    model = BASES["base"]()
    for index in range(LAYERS):
        model.model.layers[index] = in_eight_bits(BASES["base"]()).model.layers[1]
    model.is_loaded_in_4bit = True
    return adapted(model), Expect()


def float8_factors() -> Case:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    return model, Expect()


def loaded_under_two_names(tmp: Path) -> Case:
    trained = adapted()
    train_b(trained)
    trained.save_pretrained(str(tmp))
    model = PeftModel.from_pretrained(BASES["base"](), str(tmp), is_trainable=True)
    model.load_adapter(str(tmp), adapter_name="again", is_trainable=True)
    model.base_model.set_adapter(["default", "again"])
    return model, Expect()


def exploded() -> Case:
    model = adapted()
    train_b(model, -3e4)
    return model, Expect()


def a_frozen_in_the_first_block() -> Case:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name and "layers.0" in name:
            parameter.requires_grad_(False)
    return model, Expect()


def magnitude_frozen_in_the_first_block() -> Case:
    model = adapted(use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name and "layers.0" in name:
            parameter.requires_grad_(False)
    return model, Expect()


def norm_in_the_other_16_bits() -> Case:
    base = BASES["base"]().to(torch.float16)
    base.model.norm.to(torch.bfloat16)
    return adapted(base), Expect()


def base_made_for_inference() -> Case:
    with torch.inference_mode():
        base = BASES["base"]()
    return adapted(base), Expect()


FAULTS: list[tuple[Callable[..., Case], str, str]] = [
    (base_made_for_inference, "weights_are_for_inference", "error"),
    (prepared_after_wrapping, "no_adapter_is_trainable", "error"),
    (loaded_without_is_trainable, "no_adapter_is_trainable", "error"),
    (only_the_head_trains, "no_adapter_is_trainable", "warning"),
    (one_layer_disabled, "adapters_are_disabled", "error"),
    (one_layer_left_merged, "adapter_left_merged", "error"),
    (norms_unfrozen, "base_is_trainable", "error"),
    (own_head_left_out_of_the_configuration, "base_is_trainable", "error"),
    (three_wrappers, "peft_wraps_peft", "error"),
    (saved_head_in_float16, "trained_weights_are_float16", "error"),
    (infinite_magnitude, "adapter_is_not_finite", "error"),
    (nan_in_saved_head, "adapter_is_not_finite", "error"),
    (nan_in_a_norm, "base_is_not_finite", "error"),
    (one_projection_frozen, "some_adapters_are_frozen", "warning"),
    (token_rows_frozen, "saved_copy_is_frozen", "error"),
    (tied_head_saved_alone, "tied_weight_is_trained_on_one_side", "error"),
    *(
        [(merge_of_two_untied_copies, "tied_weight_is_trained_on_one_side", "warning")]
        if TIES_WHAT_DIFFERS
        else []
    ),
    (second_transformers_adapter_not_chosen, "trainable_adapter_is_not_active", "error"),
    (trainable_adapter_loaded_but_not_chosen, "trainable_adapter_is_not_active", "error"),
    (nothing_active, "no_adapter_is_active", "error"),
    (merged_and_unloaded_in_place, "no_adapter_is_active", "error"),
    (fraction_reported, "reported_percent_is_wrong", "warning"),
    (invented_percentage, "reported_percent_is_wrong", "warning"),
    (base_dropout_live_in_evaluation, "dropout_is_live", "error"),
    (attention_dropout_live_at_inference, "dropout_is_live", "error"),
    (one_expert_kind_dequantized, "base_is_partly_quantized", "warning"),
    (flagged_but_never_quantized, "base_is_not_quantized", "error"),
    (float16_compute_in_bfloat16, "compute_dtype_differs_from_model", "warning"),
    (b_frozen_at_zero, "adapter_can_not_learn", "error"),
    (a_zeroed_and_frozen, "adapter_can_not_learn", "error"),
    (embedding_factor_frozen_at_zero, "adapter_can_not_learn", "error"),
    (one_layer_not_loaded, "adapter_holds_no_update", "error"),
    (half_the_layers_loaded, "adapter_is_trained_in_part", "warning"),
    (fresh_one_was_trained, "fresh_adapter_changes_the_base", "warning"),
    (scaling_at_zero, "scaling_was_changed", "error"),
    (scaled_layers_never_unscaled, "scaling_was_changed", "warning"),
    (rank_edited_afterwards, "config_changed_after_creation", "error"),
    (head_replaced_afterwards, "adapter_is_lost", "error"),
    (embedding_under_lora_grown, "factor_shapes_do_not_fit", "error"),
    (factor_of_another_rank, "factor_shapes_do_not_fit", "error"),
    (checkpointing_by_torch_default, "checkpointing_cuts_the_gradient", "error"),
    (checkpointing_with_only_the_head_outside, "checkpointing_cuts_the_gradient", "error"),
    (quantized_together_with_its_base, "no_adapter_is_trainable", "error"),
    (nan_under_four_bits, "base_is_not_finite", "error"),
    (one_block_in_eight_bits_instead_of_four, "base_is_partly_quantized", "warning"),
    (eight_bits_called_four, "base_is_not_quantized", "error"),
    (float8_factors, "trained_weights_are_float16", "error"),
    (loaded_under_two_names, "adapter_is_active_twice", "warning"),
    (a_frozen_in_the_first_block, "some_adapters_are_frozen", "warning"),
    (magnitude_frozen_in_the_first_block, "some_adapters_are_frozen", "warning"),
    (norm_in_the_other_16_bits, "base_mixes_half_dtypes", "warning"),
    (exploded, "adapter_has_exploded", "warning"),
]


def built(build: Callable[..., Case], tmp_path: Path) -> Case:
    torch.manual_seed(0)
    return build(tmp_path) if build.__code__.co_argcount else build()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "rule", "severity"), FAULTS, ids=[b.__name__ for b, _, _ in FAULTS])
def test_fault_is_named_and_nothing_else(
    build: Callable[..., Case], rule: str, severity: str, tmp_path: Path
) -> None:
    model, expect = built(build, tmp_path)
    report = check_model(model, expect=expect)
    said = {(f.rule, f.severity) for f in report.findings if f.severity != "info"}
    assert said == {(rule, severity)}, str(report)


# ----------------------------------------------------------------------------------------------- healthy


def lora_fa() -> Case:
    model = adapted()
    set_trainable(model, "lora_A", False)
    return model, Expect()


def b_frozen_at_random() -> Case:
    model = adapted(init_lora_weights=False)
    set_trainable(model, "lora_B", False)
    return model, Expect()


def frozen_reference_beside_policy(tmp: Path) -> Case:
    adapted().save_pretrained(str(tmp))
    model = PeftModel.from_pretrained(BASES["base"](), str(tmp), is_trainable=True)
    model.load_adapter(str(tmp), adapter_name="reference", is_trainable=False)
    model.set_adapter("default")
    return model, Expect()


def kbit_prepared_with_bfloat16_compute() -> Case:
    base = BASES["base_4bit"]()
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.bfloat16
    return adapted(prepare_model_for_kbit_training(base)), Expect()


def biases_trained_on_purpose() -> Case:
    return adapted("gpt2_base", target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only"), Expect()


def value_head_outside() -> Case:
    class WithValueHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_model = adapted()
            self.v_head = nn.Linear(WIDTH, 1)

    return WithValueHead(), Expect()


def pissa_fresh() -> Case:
    return adapted(init_lora_weights="pissa"), Expect(fresh=True)


def orthogonal_fresh() -> Case:
    return adapted(init_lora_weights="orthogonal"), Expect(fresh=True)


def rslora_with_patterns() -> Case:
    return adapted(use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8}), Expect()


def concatenated_adapters() -> Case:
    model = adapted()
    model.add_adapter("b", config(r=4, lora_alpha=4))
    train_b(model)
    model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "mix", combination_type="cat")
    model.set_adapter("mix")
    return model, Expect()


def padded_for_hotswapping() -> Case:
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    return model, Expect()


def grouped_convolution() -> Case:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 3, groups=4)

    return adapted(Convolutions(), target_modules=["conv"], r=4), Expect()


def dora() -> Case:
    return adapted(use_dora=True), Expect(fresh=True)


def without_any_weights() -> Case:
    return adapted(BASES["base"]().to("meta")), Expect()


def real_adapter_on_offloaded_base() -> Case:
    model = adapted()
    for layer in layers_of(model):
        layer.get_base_layer().to("meta")
    return model, Expect()


def merged_for_inference() -> Case:
    model = adapted()
    train_b(model)
    model.merge_adapter()
    return model.eval(), Expect(purpose="inference", fresh=False)


def compiled() -> Case:
    return torch.compile(adapted()), Expect()


def token_rows() -> Case:
    return adapted(trainable_token_indices=[5, 6]), Expect()


def adapter_in_train_mode_on_eval_base() -> Case:
    return adapted(BASES["base"]().eval(), lora_dropout=0.1), Expect()


def evaluation_between_epochs() -> Case:
    return adapted(lora_dropout=0.1).eval(), Expect(purpose="eval")


def rounded_percentage() -> Case:
    model = adapted()
    trainable, total = model.get_nb_trainable_parameters()
    return model, Expect(reported_percent=round(100 * trainable / total, 2))


def percentage_of_the_base_alone() -> Case:
    model = adapted()
    trainable, total = model.get_nb_trainable_parameters()
    return model, Expect(reported_percent=100 * trainable / (total - trainable))


def transformers_own_integration() -> Case:
    model = BASES["base"]()
    model.add_adapter(config())
    return model, Expect()


def mixed_model() -> Case:
    return PeftMixedModel(BASES["base"](), config()), Expect()


def unused_experts() -> Case:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(16, 16)}) for _ in range(4))

    model = adapted(Sparse(), target_modules=["w1"], r=4)
    train_b(model.base_model.model.experts[2])
    return model, Expect()


def text_only_training_of_a_vision_model() -> Case:
    model = adapted("vision_language_base")
    train_b(model.base_model.model.language_model)
    return model, Expect()


def checkpointing_under_a_trained_embedding() -> Case:
    base = BASES["base"]()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = adapted(base, target_modules=["q_proj", "embed_tokens"])
    for module in base.modules():
        module._forward_hooks.clear()
    return model, Expect()


def checkpointing_with_a_hook_of_ones_own() -> Case:
    base = BASES["base"]()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = adapted(base)
    base.get_input_embeddings()._forward_hooks.clear()
    base.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())
    return model, Expect()


def skipped_layer_declared() -> Case:
    model = adapted("base_4bit")
    base = model.base_model.model
    base.config.quantization_config = {
        "load_in_4bit": True,
        "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"],
    }
    base.model.layers[1].mlp.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False).requires_grad_(False)
    return model, Expect()


def dequantized_on_purpose() -> Case:
    base = BASES["base"]()
    base.is_loaded_in_4bit, base.is_quantized = True, False
    return adapted(base), Expect()


def eight_bit_layers_that_keep_float16() -> Case:
    base = BASES["base"]()
    for block in base.model.layers:
        block.mlp.up_proj = bnb.nn.Linear8bitLt(WIDTH, 2 * WIDTH, bias=False, has_fp16_weights=True)
        block.mlp.up_proj.requires_grad_(False)
    return adapted(base), Expect()


def after_some_steps() -> Case:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, Expect(fresh=False)


def bfloat16_throughout() -> Case:
    base = BASES["base"]().to(torch.bfloat16)
    return get_peft_model(base, config(), autocast_adapter_dtype=False), Expect()


def adapter_deleted_and_another_left() -> Case:
    model = adapted()
    model.add_adapter("second", config(target_modules=["q_proj"]))
    model.set_adapter("second")
    model.delete_adapter("default")
    return model, Expect()


def adapters_on_different_modules() -> Case:
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("second", config(target_modules=["k_proj", "o_proj"]))
    model.set_adapter("second")
    return model, Expect()


def head_of_several_layers_saved() -> Case:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.head = nn.Linear(8, 8), Head()

    return adapted(Encoder(), target_modules=["query"], modules_to_save=["head"], r=2), Expect()


def attention_of_torch() -> Case:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    return adapted(Attention(), target_modules=["attention"], r=2), Expect()


def weaker_at_inference() -> Case:
    model = adapted()
    train_b(model)
    for layer in layers_of(model):
        layer.set_scale("default", 0.7)
    return model.eval(), Expect(purpose="inference")


def layers_replicated() -> Case:
    return adapted(layer_replication=[[0, LAYERS], [0, LAYERS]]), Expect()


def two_fresh_adapters_from_one_seed() -> Case:
    model = adapted()
    model.add_adapter("again", config())
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lora_A["again"].weight.copy_(layer.lora_A["default"].weight)
    model.base_model.set_adapter(["default", "again"])
    return model, Expect()


def large_but_trained() -> Case:
    model = adapted()
    train_b(model, 50.0)
    return model, Expect()


def norms_in_32_bits_beside_16() -> Case:
    base = BASES["base"]().to(torch.bfloat16)
    base.model.norm.float()
    return adapted(base), Expect()


def magnitude_frozen_throughout() -> Case:
    model = adapted(use_dora=True)
    set_trainable(model, "magnitude", False)
    return model, Expect()


HEALTHY: list[Callable[..., Case]] = [
    lora_fa,
    b_frozen_at_random,
    frozen_reference_beside_policy,
    kbit_prepared_with_bfloat16_compute,
    biases_trained_on_purpose,
    value_head_outside,
    pissa_fresh,
    orthogonal_fresh,
    rslora_with_patterns,
    concatenated_adapters,
    padded_for_hotswapping,
    grouped_convolution,
    dora,
    without_any_weights,
    real_adapter_on_offloaded_base,
    merged_for_inference,
    compiled,
    token_rows,
    adapter_in_train_mode_on_eval_base,
    evaluation_between_epochs,
    rounded_percentage,
    percentage_of_the_base_alone,
    transformers_own_integration,
    mixed_model,
    unused_experts,
    text_only_training_of_a_vision_model,
    checkpointing_under_a_trained_embedding,
    checkpointing_with_a_hook_of_ones_own,
    skipped_layer_declared,
    dequantized_on_purpose,
    eight_bit_layers_that_keep_float16,
    after_some_steps,
    bfloat16_throughout,
    adapter_deleted_and_another_left,
    adapters_on_different_modules,
    head_of_several_layers_saved,
    attention_of_torch,
    weaker_at_inference,
    layers_replicated,
    two_fresh_adapters_from_one_seed,
    large_but_trained,
    norms_in_32_bits_beside_16,
    magnitude_frozen_throughout,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", HEALTHY, ids=[b.__name__ for b in HEALTHY])
def test_unusual_but_healthy_is_not_flagged(build: Callable[..., Case], tmp_path: Path) -> None:
    model, expect = built(build, tmp_path)
    report = check_model(model, expect=expect)
    assert not report.errors, str(report)
    assert not report.warnings, str(report)


# ------------------------------------------------------------------------------------- reentrant, as it runs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hooked", [True, False], ids=["input gradients", "none"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=["plain", "LoRA on the embedding", "embedding saved"],
)
@pytest.mark.parametrize("kwargs", [None, {}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_reentrant_fact_is_what_a_backward_pass_shows(
    kwargs: dict[str, bool] | None, changes: dict[str, Any], hooked: bool
) -> None:
    model = adapted(**changes)
    base = model.base_model.model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    base.enable_input_require_grads()
    if not hooked:
        for module in base.modules():
            module._forward_hooks.clear()
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    if loss.requires_grad:
        loss.backward()
    factors = [p for n, p in model.named_parameters() if "lora_B" in n]
    reached = all(p.grad is not None and bool(p.grad.any()) for p in factors)
    assert model_facts(model).reentrant_without_inputs is not reached


# -------------------------------------------------------------------------------------------------- laws


@cache
def plain_facts() -> ModelFacts:
    return model_facts(adapted())


def plain_layer() -> LayerState:
    return plain_facts().layers[0]


def codes(facts: ModelFacts, rule: str, expect: Expect | None = None) -> list[str]:
    return [finding.severity for finding in RULES[rule](facts, expect or Expect())]


def with_factors(layer: LayerState, zero: tuple[bool, bool], trainable: tuple[bool, bool]) -> LayerState:
    return replace(
        layer,
        a=replace(layer.a, zero=zero[0], trainable=trainable[0]),
        b=replace(layer.b, zero=zero[1], trainable=trainable[1]),
    )


pairs = st.tuples(st.booleans(), st.booleans())


@given(zero=pairs, trainable=pairs)
def test_can_learn_is_what_autograd_says(zero: tuple[bool, bool], trainable: tuple[bool, bool]) -> None:
    layer = with_factors(plain_layer(), zero, trainable)
    a, b = (
        torch.full((2, 2), 0.0 if z else 0.5, requires_grad=t) for z, t in zip(zero, trainable, strict=True)
    )
    product = (b @ a).sum()
    if product.requires_grad:
        product.backward()
    moved = any(p.grad is not None and bool(p.grad.any()) for p in (a, b))
    assert layer.can_learn is moved


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_frozen_in_part_needs_both(trainable: list[bool]) -> None:
    layer = plain_layer()
    layers = tuple(with_factors(layer, (False, True), (t, t)) for t in trainable)
    facts = replace(plain_facts(), layers=layers)
    assert bool(codes(facts, "some_adapters_are_frozen")) is (len(set(trainable)) == 2)
    assert bool(codes(facts, "no_adapter_is_trainable")) is (not any(trainable))


@given(
    trainable=st.integers(1, 10**10),
    total=st.integers(10**5, 10**12),
    digits=st.integers(1, 8),
)
def test_a_percentage_to_any_number_of_digits_is_right(trainable: int, total: int, digits: int) -> None:
    total += trainable
    known = replace(
        plain_facts(), trainable_parameters=trainable, total_parameters=total, stored_parameters=total
    )
    percent = 100 * trainable / total
    for reported in (percent, round(percent, digits)):
        assert not codes(known, "reported_percent_is_wrong", Expect(reported_percent=reported))
    assert codes(known, "reported_percent_is_wrong", Expect(reported_percent=3 * percent + 1))


@given(scaling=st.floats(0, 64), purpose=st.sampled_from(["train", "eval", "inference"]))
def test_scaling_is_judged_by_what_the_layer_says(scaling: float, purpose: Any) -> None:
    layer = replace(plain_layer(), scaling=scaling)
    facts = replace(plain_facts(), layers=(layer,))
    same = abs(scaling - layer.configured_scaling) <= 1e-5 * layer.configured_scaling
    said = codes(facts, "scaling_was_changed", Expect(purpose=purpose))
    expected = "info" if purpose == "inference" else "error" if scaling == 0 else "warning"
    assert said == ([] if same else [expected])


@given(st.lists(st.sampled_from([None, "4bit"]), min_size=1, max_size=8), st.booleans())
def test_partly_quantized_is_about_modules_of_one_place(methods: list[str | None], declared: bool) -> None:
    facts = plain_facts()
    modules = tuple(
        BaseModule(f"model.layers.{i}.mlp.up_proj", "Linear", 8, 8, method)
        for i, method in enumerate(methods)
    )
    tower = BaseModule("vision.up_proj", "Linear", 8, 8, None)
    found = Quantization("4bit" if declared else None, (), (), ())
    base = replace(facts.base, modules=(*modules, tower), quantization=found)
    said = codes(replace(facts, base=base), "base_is_partly_quantized")
    mixed = len(set(methods)) == 2
    assert said == ([] if not mixed else ["warning" if declared else "info"])


@pytest.mark.parametrize(("device", "base", "flagged"), [
    ("cuda:0", "cuda:0", False), ("cpu", "cuda:0", True), ("cuda:1", "cuda:0", True),
    ("meta", "cpu", True), ("meta", "meta", False), ("cpu", "meta", False), ("cpu", "", False),
])  # fmt: skip
def test_devices(device: str, base: str, flagged: bool) -> None:
    layer = plain_layer()
    layer = replace(
        layer, a=replace(layer.a, device=device), b=replace(layer.b, device=device), base_device=base
    )
    assert bool(codes(replace(plain_facts(), layers=(layer,)), "adapter_is_on_another_device")) is flagged


@pytest.mark.parametrize(("compute", "rest", "flagged"), [
    ("float32", "float32", False), ("bfloat16", "float32", False), ("bfloat16", "bfloat16", False),
    ("float32", "bfloat16", True), ("float32", "float16", True), ("float16", "bfloat16", True),
    ("bfloat16", "float16", False), ("float16", "float32", False), ("None", "bfloat16", False),
])  # fmt: skip
def test_compute_dtypes(compute: str, rest: str, flagged: bool) -> None:
    facts = plain_facts()
    found = Quantization("4bit", (), (compute,), ())
    base = replace(facts.base, quantization=found, float_dtypes=(rest, "float32"))
    assert bool(codes(replace(facts, base=base), "compute_dtype_differs_from_model")) is flagged


def test_base_fix_depends_on_how_much_trains() -> None:
    facts = plain_facts()
    for share, said in ((0.9, "model.requires_grad_(False)"), (0.01, "list ['norm'] in modules_to_save")):
        part = TrainableBase("model.norm.weight", int(share * facts.base.parameters))
        (finding,) = RULES["base_is_trainable"](replace(facts, trainable_base=(part,)), Expect())
        assert said in finding.fix


def test_every_rule_is_silent_on_plain_facts_for_every_purpose() -> None:
    facts = plain_facts()
    for purpose in ("train", "eval", "inference"):
        for rule in RULES.values():
            if rule.needs is ModelFacts:
                assert not list(rule(copy.deepcopy(facts), Expect(purpose=purpose))), rule.name


@pytest.mark.filterwarnings("ignore")
def test_the_fix_of_frozen_adapters_says_how_they_came_to_be(tmp_path: Path) -> None:
    (packed,) = check_model(quantized_together_with_its_base()[0]).errors
    assert "quantized to uint8" in packed.observed
    assert "quantize the base before get_peft_model" in packed.fix
    (added,) = check_model(added_to_a_frozen_one_and_not_chosen(tmp_path)[0]).errors
    assert "model.set_adapter('fresh')" in added.fix


def test_findings_group_modules() -> None:
    model, expect = norms_unfrozen()
    (finding,) = check_model(model, expect=expect).findings
    assert "model.layers.*.input_layernorm.weight" in finding.where
    assert f"{2 * LAYERS + 1} base parameters" in finding.observed
