"""What each argument of a trainer does to memory: read, run, said to be a bound, or without effect."""

from __future__ import annotations

import contextlib
import copy
import gc
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from pytest_lora import estimate_memory
from pytest_lora.inspection.memory import dry_run
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.memory.setting import checked_setting
from pytest_lora.memory.trainer import not_modelled, read_arguments
from tests.memory.test_trainers import (
    BASE,
    BATCH,
    CONFIG,
    LENGTH,
    REAL,
    SEVEN,
    Allocations,
    as_it_is,
    numbers,
    peak_and_largest,
    plain,
    require_same,
)

trl = pytest.importorskip("trl", minversion="1.16")

NUMBERS = torch.zeros(BATCH)
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "SFT smooths labels": ("trl-sft", {"label_smoothing_factor": 0.1}, {}),
    "DPO knows its reference": (
        "trl-dpo",
        {"precompute_ref_log_probs": True},
        {"ref_chosen_logps": NUMBERS, "ref_rejected_logps": NUMBERS},
    ),
    "KTO without KL": ("trl-kto", {"loss_type": "apo_zero_unpaired"}, {}),
    "GRPO on some tokens": ("trl-grpo", {"top_entropy_quantile": 0.5}, {}),
    "GRPO with its head in float32": ("trl-grpo", {"cast_lm_head_to_fp32": True}, {}),
}


@pytest.mark.lora_slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_an_argument_allocates_what_a_real_one_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, arguments, known = STEPS[name]
    made, batch = REAL[trainer](tmp_path, **arguments)
    if trainer == "trl-kto":
        batch = {name: value for name, value in batch.items() if not name.startswith("KL_")}
    require_same(trainer, made, {**batch, **known}, monkeypatch)


def test_the_trainer_smooths_labels_outside_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(LlamaForCausalLM(BASE), CONFIG)
    model.config.use_cache = False
    args = TrainingArguments(**plain(tmp_path, label_smoothing_factor=0.1))
    trainer = Trainer(model, args)
    ids = numbers(BATCH, LENGTH)
    gc.collect()
    with Allocations() as real:
        loss: Any = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        del loss
    monkeypatch.setattr(dry_run, "fused_kernels", as_it_is)

    def traced(given: Any) -> tuple[int, int]:
        setting = checked_setting(args=given, dtype="float32", autocast=False)
        asked = replace(setting, batch_size=BATCH, seq_len=LENGTH)
        return peak_and_largest(dry_run.trace(build(BASE, CONFIG, asked, cut=Cut(0)), asked))

    peak, largest = traced(args)
    assert largest == real.largest
    assert peak == pytest.approx(real.peak, rel=0.01)
    args.label_smoothing_factor = 0.0
    assert traced(args)[0] < 0.95 * peak, "the model's own loss"


CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("arguments", "words", "bound"),
    [
        ({"torch_compile": True}, "torch.compile", "at most"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size", "at most"),
        (
            {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
            "every_n_layers",
            "at least",
        ),
        ({**CHECKPOINTED, "gradient_checkpointing_kwargs": {"offload": True}}, "host", "at most"),
        ({**CHECKPOINTED, "gradient_checkpointing_kwargs": {"selective": True}}, "selective", "at least"),
        ({"deepspeed": "zero3.json"}, "deepspeed", "at most"),
        ({"fsdp": True}, "fsdp", "at most"),
        (
            {
                "precompute_ref_log_probs": True,
                "precompute_ref_batch_size": 8,
                "per_device_train_batch_size": 4,
            },
            "read by 8",
            "at least",
        ),
        ({"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": False}}, "Liger", "at most"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "", ""),
        ({**CHECKPOINTED, "gradient_checkpointing_kwargs": {"every_n_layers": 1}}, "", ""),
        (
            {
                "precompute_ref_log_probs": True,
                "precompute_ref_batch_size": 4,
                "per_device_train_batch_size": 4,
            },
            "",
            "",
        ),
        ({"precompute_ref_batch_size": 8, "per_device_train_batch_size": 4}, "", ""),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}},
            "",
            "",
        ),
        ({"liger_kernel_config": {"rms_norm": False}}, "", ""),
        ({}, "", ""),
    ],
)
def test_arguments_that_make_a_bound(arguments: dict[str, Any], words: str, bound: str) -> None:
    found = not_modelled(SimpleNamespace(**arguments), {})
    assert [part.bound for part in found] == ([bound] if bound else [])
    assert all(words in part.what for part in found)


@pytest.mark.parametrize("beside", [{"gpus": 2}, {"parallel": "zero3.json"}])
def test_sharing_that_is_said_is_no_bound(beside: dict[str, Any]) -> None:
    assert not not_modelled(SimpleNamespace(deepspeed="zero3.json", fsdp=True), beside)


def test_a_bound_of_arguments_reaches_the_estimate(tmp_path: Path) -> None:
    args = TrainingArguments(**plain(tmp_path))
    point: dict[str, Any] = {"args": args, "batch_size": 1, "seq_len": 16}
    assert estimate_memory(CONFIG, SEVEN, **point).bound is None
    args.auto_find_batch_size = True
    assert estimate_memory(CONFIG, SEVEN, **point).bound == "at most"


def test_what_is_read_beside_the_usual(tmp_path: Path) -> None:
    with contextlib.suppress(ImportError):
        sft = trl.SFTConfig(**plain(tmp_path, max_length=1000, pad_to_multiple_of=64, eval_on_start=True))
        grpo = trl.GRPOConfig(**plain(tmp_path, num_generations=BATCH, cast_lm_head_to_fp32=True))
    found = read_arguments(sft)
    assert (found["seq_len"], found["evaluation"].batch_size) == (1024, 8)
    sft.packing = True
    assert read_arguments(sft)["seq_len"] == 1000, "rows that are full are not padded"
    sft.packing, sft.pad_to_multiple_of, sft.eval_on_start = False, None, False
    assert read_arguments(sft)["seq_len"] == 1000
    assert "evaluation" not in read_arguments(sft)
    assert read_arguments(grpo)["upcast"] == ("lm_head",)
    assert "upcast" not in read_arguments(sft)
    assert "workspace" not in read_arguments(sft)
    sft.full_determinism = True
    assert read_arguments(sft)["workspace"] == 2**17
    sft.use_cache = True
    assert estimate_memory(CONFIG, SEVEN, args=sft).setting.use_cache
    sft.use_liger_kernel = True
    assert read_arguments(sft)["kernels"] == "liger"
    sft.liger_kernel_config = {"swiglu": False}
    assert read_arguments(sft)["kernels"] is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_grpo_casts_is_in_float32_and_what_it_is_tied_to_hands_on_bfloat16(
    tied: bool, tmp_path: Path
) -> None:
    base = copy.deepcopy(BASE)
    base.tie_word_embeddings = tied
    with contextlib.suppress(ImportError):
        args = trl.GRPOConfig(**plain(tmp_path, num_generations=BATCH, cast_lm_head_to_fp32=True))
    setting = checked_setting(args=args, upcast=read_arguments(args)["upcast"])
    asked = replace(setting, batch_size=BATCH, seq_len=LENGTH)
    transformer: Any = build(base, CONFIG, asked, cut=Cut(0)).transformer
    embeddings = transformer.get_input_embeddings()
    assert transformer.lm_head.weight.dtype is torch.float32
    assert (embeddings.weight is transformer.lm_head.weight) is tied
    assert embeddings.weight.dtype is (torch.float32 if tied else torch.bfloat16)
    assert embeddings(torch.zeros(1, 1, dtype=torch.long, device="meta")).dtype is torch.bfloat16


READ = """
per_device_train_batch_size gradient_accumulation_steps optim bf16 fp16 torch_empty_cache_steps use_cache eval_strategy
eval_on_start per_device_eval_batch_size eval_accumulation_steps max_length pad_to_multiple_of packing packing_strategy
padding_free gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing use_liger_kernel
activation_checkpointing_kwargs liger_kernel_config cast_lm_head_to_fp32 label_smoothing_factor full_determinism
"""
BOUND = """
torch_compile torch_compile_backend torch_compile_mode auto_find_batch_size deepspeed fsdp fsdp_config
activation_offloading precompute_ref_batch_size use_vllm vllm_mode vllm_gpu_memory_utilization steps_per_generation
"""
RUN_BY_TRL = """
loss_type loss_weights beta f_divergence_type f_alpha_divergence_coef discopop_tau label_smoothing ld_alpha
use_weighting precompute_ref_log_probs disable_dropout desirable_weight undesirable_weight
center_rewards_coefficient epsilon epsilon_high delta importance_sampling_level top_entropy_quantile entropy_coef
entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target use_adaptive_entropy num_iterations
off_policy_mask_threshold sapo_temperature_neg sapo_temperature_pos temperature use_bias_correction_kl vespo_k_neg
vespo_k_pos vespo_lambda_neg vespo_lambda_pos max_completion_length vllm_importance_sampling_correction
vllm_importance_sampling_mode vllm_importance_sampling_cap vllm_importance_sampling_clip_max
vllm_importance_sampling_clip_min scale_rewards mask_truncated_completions average_tokens_across_devices
"""
REFUSED_BY_TRL = "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
"""With an adapter."""
WITHOUT_EFFECT = """
output_dir do_train do_eval do_predict num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
neftune_noise_alpha logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level
log_level_replica log_on_each_node report_to run_name project disable_tqdm include_num_input_tokens_seen
trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps eval_delay batch_eval_metrics
eval_do_concat_batches eval_use_gather_object prediction_loss_only include_for_metrics label_names bf16_full_eval
fp16_full_eval metric_for_best_model greater_is_better load_best_model_at_end save_strategy save_steps
save_total_limit save_only_model save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint
resume_from_checkpoint push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
ignore_data_skip data_seed seed tf32 debug skip_memory_metrics use_cpu local_rank
accelerator_config parallelism_config ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters
ddp_static_graph ddp_timeout dataloader_drop_last dataloader_num_workers dataloader_multiprocessing_context
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order
remove_unused_columns train_sampling_strategy length_column_name assistant_only_loss completion_only_loss
chat_template_path dataset_kwargs dataset_num_proc dataset_text_field eos_token pad_token truncation_mode
shuffle_dataset model_init_kwargs trust_remote_code router_aux_loss_coef eval_packing cache_implementation
chat_template_kwargs ds3_gather_for_generation generation_batch_size generation_kwargs log_completions
log_completions_hub_repo log_multimodal log_unique_prompts max_tool_calling_iterations min_p
multi_objective_aggregation num_completions_to_print num_generations num_generations_eval repetition_penalty
reward_weights top_k top_p transformers_continuous_batching_config use_transformers_continuous_batching
use_transformers_paged vllm_enable_sleep_mode vllm_group_port vllm_max_model_length vllm_model_impl
vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex
vllm_tensor_parallel_size
"""
"""On the peak of a training step, or of an evaluation that keeps its loss, on one GPU."""


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "KTOConfig", "RewardConfig", "GRPOConfig"])
def test_every_argument_is_decided(name: str) -> None:
    decided = [
        field for kind in (READ, BOUND, RUN_BY_TRL, REFUSED_BY_TRL, WITHOUT_EFFECT) for field in kind.split()
    ]
    assert len(decided) == len(set(decided))
    if Version(version("transformers")) < Version("5"):
        pytest.skip("the arguments of the newest versions are decided")
    missing = {field.name for field in fields(getattr(trl, name))} - set(decided)
    assert not missing, "read them, say that they make a bound, or show that they do nothing to memory"
