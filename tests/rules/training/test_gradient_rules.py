"""Gradients, frozen and changed weights, dtypes and modes of the model: faults named, healthy trainings left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from pytest_lora import Expect, Report, check_training
from pytest_lora.bases.examples.models import (
    BASES,
    WIDTH,
    classifier_batch,
    image_batch,
    language_batch,
)
from tests.rules.training.setups import (
    Build,
    TwoTowers,
    adam,
    adapted,
    leave_alone,
    name_the_fault,
    t5,
    trainable,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def reentrant_checkpointing() -> Report:
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.get_input_embeddings()._forward_hooks.clear()
    return check_training(model, language_batch())


def adapters_disabled() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "score.modules" in name)
    return check_training(model, classifier_batch())


def disabled_in_the_loss() -> Report:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        with model.disable_adapter():
            found: torch.Tensor = model(**batch).loss
            return found

    return check_training(adapted(), language_batch(), loss_fn=loss)


def merged_while_training() -> Report:
    model = adapted()
    model.merge_adapter()
    return check_training(model, language_batch())


def frozen_but_for_the_head() -> Report:
    model = adapted("classifier_base", task_type="SEQ_CLS")
    for parameter in trainable(model, "lora_"):
        parameter.requires_grad_(False)
    return check_training(model, classifier_batch())


def scaling_of_zero() -> Report:
    return check_training(adapted(lora_alpha=0), language_batch())


def tower_behind_detach() -> Report:
    model = adapted(TwoTowers(detached=True), target_modules=["q_proj"])
    return check_training(model, {**language_batch(), "pixels": torch.randn(4, 1, WIDTH)})


def tower_outside_the_forward() -> Report:
    model = adapted(TwoTowers(), target_modules=["vision_tower.q_proj"])
    return check_training(model, {**language_batch(), "pixel_values": torch.randn(4, 3)})


def everything_trains() -> Report:
    model = adapted()
    model.requires_grad_(True)
    return check_training(model, language_batch())


def base_was_trained_before() -> Report:
    model = adapted()
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    return check_training(model, language_batch(), base_snapshot=snapshot)


def head_trained_that_was_to_stay_put() -> Report:
    model = adapted()
    head = model.base_model.model.lm_head.weight.requires_grad_(True)
    return check_training(
        model, language_batch(), base_snapshot={"base_model.model.lm_head.weight": head + 0.1}
    )


def statistics_moved_before() -> Report:
    model = adapted("batchnorm_base", target_modules=["conv"]).eval()
    snapshot = {n: b.detach().clone() for n, b in model.named_buffers()}
    model.train()(**image_batch())
    return check_training(model.eval(), image_batch(), base_snapshot=snapshot)


def half_precision_under_nadam() -> Report:
    model = adapted().half()
    return check_training(model, language_batch(), optimizer=torch.optim.NAdam(trainable(model), lr=1e-3))


def loss_of_numbers() -> Report:
    return check_training(
        adapted(), language_batch(), loss_fn=lambda m, b: torch.tensor(m(**b).loss.item(), requires_grad=True)
    )


def dropout_asleep() -> Report:
    model = adapted(lora_dropout=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return check_training(model, language_batch())


def dropout_awake_for_inference() -> Report:
    return check_training(adapted(lora_dropout=0.1), language_batch(), expect=Expect(purpose="inference"))


def weights_of_two_dtypes() -> Report:
    model = adapted()
    model.get_base_model().lm_head.bfloat16()
    return check_training(model, language_batch())


def trainable_adapter_not_active() -> Report:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    return check_training(model, language_batch())


FAULTS: dict[Build, tuple[str, str]] = {
    reentrant_checkpointing: ("LORA313", "reentrant gradient checkpointing"),
    adapters_disabled: ("LORA313", "disabled"),
    disabled_in_the_loss: ("LORA312", "no graph"),
    merged_while_training: ("LORA313", "merged"),
    frozen_but_for_the_head: ("LORA313", "frozen"),
    scaling_of_zero: ("LORA313", "scaling is 0"),
    tower_behind_detach: ("LORA314", "vision_tower"),
    tower_outside_the_forward: ("LORA313", "outside the forward pass"),
    everything_trains: ("LORA330", "requires_grad=True"),
    base_was_trained_before: ("LORA330", "up_proj"),
    head_trained_that_was_to_stay_put: ("LORA330", "lm_head"),
    statistics_moved_before: ("LORA331", "running statistics"),
    half_precision_under_nadam: ("LORA309", "float16"),
    loss_of_numbers: ("LORA313", "no gradient"),
    dropout_asleep: ("LORA332", "eval mode"),
    dropout_awake_for_inference: ("LORA333", "inference"),
    weights_of_two_dtypes: ("LORA319", "one dtype"),
    trainable_adapter_not_active: ("LORA313", "'second' is not active"),
}


def reference_adapter_frozen() -> Report:
    model = adapted()
    model.add_adapter("reference", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")
    return check_training(model, language_batch())


def stacked_on_a_frozen_adapter() -> Report:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "second"])
    for parameter in trainable(model, "default"):
        parameter.requires_grad_(False)
    return check_training(model, language_batch())


def dora() -> Report:
    model = adapted(use_dora=True, use_rslora=True, r=32)
    return check_training(model, language_batch(), optimizer=adam(model))


def token_rows_and_biases() -> Report:
    model = adapted("gpt2_base", target_modules=["c_attn"], bias="all")
    return check_training(model, language_batch(), optimizer=adam(model))


def four_bit() -> Report:
    model = adapted("base_4bit", target_modules="all-linear", lora_dropout=0.05)
    return check_training(model, language_batch(), optimizer=adam(model, 2e-4))


def norms_train_too() -> Report:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return check_training(model, language_batch(), optimizer=adam(model))


def pissa_with_a_snapshot_of_the_original() -> Report:
    base = BASES["base"]()
    snapshot = {n: p.detach().clone() for n, p in base.named_parameters()}
    return check_training(adapted(base, init_lora_weights="pissa"), language_batch(), base_snapshot=snapshot)


def merged_and_unmerged_before() -> Report:
    model = adapted(init_lora_weights=False)
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    model.merge_adapter()
    model.unmerge_adapter()
    return check_training(model, language_batch(), base_snapshot=snapshot)


def policy_gradient_from_zero() -> Report:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(**batch).loss
        return found - found.detach()

    # The history of such a run is zero in all its four decimals.
    return check_training(adapted(), language_batch(), loss_fn=loss, history=[0.0] * 6)


def mixture_of_experts() -> Report:
    batch = language_batch(1, 4)
    return check_training(adapted("moe_base", target_modules="all-linear"), batch)


def evaluation() -> Report:
    model = adapted(lora_dropout=0.3).eval()
    return check_training(model, language_batch(), expect=Expect(purpose="eval"))


def inputs_with_noise() -> Report:
    batch = language_batch()
    noise = torch.rand(batch["input_ids"].shape) < 0.5
    batch["input_ids"] = batch["input_ids"].masked_fill(noise, 7)
    return check_training(adapted(), batch)


def fresh_encoder_decoder_without_tied_embeddings() -> Report:
    base = t5(tie_word_embeddings=False)
    with torch.no_grad():
        base.get_output_embeddings().weight.normal_(std=5.0)
    batch = language_batch()
    batch = {**batch, "labels": batch["input_ids"]}
    return check_training(
        adapted(base, target_modules=["q", "v"]), batch, loss_fn=lambda model, batch: model(**batch).loss
    )


def saved_embedding_that_a_head_is_tied_to() -> Report:
    tying = {"ensure_weight_tying": True} if "ensure_weight_tying" in LoraConfig.__dataclass_fields__ else {}
    model = adapted("tied_base", modules_to_save=["embed_tokens"], **tying)
    return check_training(model, language_batch())


HEALTHY: tuple[Build, ...] = (
    reference_adapter_frozen,
    stacked_on_a_frozen_adapter,
    dora,
    token_rows_and_biases,
    four_bit,
    norms_train_too,
    pissa_with_a_snapshot_of_the_original,
    merged_and_unmerged_before,
    policy_gradient_from_zero,
    mixture_of_experts,
    evaluation,
    inputs_with_noise,
    fresh_encoder_decoder_without_tied_embeddings,
    saved_embedding_that_a_head_is_tied_to,
)


@pytest.mark.parametrize("build", FAULTS, ids=lambda b: b.__name__)
def test_fault_is_named(build: Build) -> None:
    name_the_fault(build, *FAULTS[build])


@pytest.mark.parametrize("build", HEALTHY, ids=lambda b: b.__name__)
def test_healthy_training_is_left_alone(build: Build) -> None:
    leave_alone(build)


@pytest.mark.parametrize("merges", [1, 40])
def test_base_weights_that_drift_in_half_precision(merges: int) -> None:
    """As a loop does that merges for each rollout: the adapter trains between the merges, and errors add up."""
    model: Any = adapted().bfloat16()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    factors = [p for n, p in model.named_parameters() if "lora_B" in n]
    generator = torch.Generator().manual_seed(0)
    for _ in range(merges):
        for factor in factors:
            factor.data += torch.randn(factor.shape, generator=generator).bfloat16() * 0.02
        model.merge_adapter()
        model.unmerge_adapter()
    report = check_training(model, language_batch(), base_snapshot=before, select=["LORA330"])
    assert len(report.warnings) == (merges > 1)
    assert not report.errors
    if merges > 1:
        assert "drifted since base_snapshot" in report.warnings[0].observed
        assert "o_proj" not in report.warnings[0].where
