"""Configurations of accelerate, DeepSpeed and FSDP as a way to share a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig

from pytest_lora import estimate_memory
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.parallel_files import SaidOfStep, read_parallel, said_of_step
from pytest_lora.inspection.recipe.beside import fsdp_version_of_arguments
from pytest_lora.memory.setting import checked_setting
from pytest_lora.memory.what_if import alternatives

FSDP = f"fsdp{fsdp_version_of_arguments()}"


def accelerate(kind: str, **more: Any) -> dict[str, Any]:
    return {"distributed_type": kind, **more}


def dimensions(fsdp: Any = None, **sizes: Any) -> dict[str, Any]:
    return accelerate("FSDP", parallelism_config=sizes, fsdp_config=fsdp)


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("given", "gpus", "wanted"),
    [
        (accelerate("MULTI_GPU"), 3, Parallel(3, "ddp")),
        (accelerate("MULTI_GPU", num_processes=4), None, Parallel(4, "ddp")),
        (accelerate("MULTI_GPU", num_processes=4), 2, Parallel(2, "ddp")),
        (accelerate("no", num_processes=4), 4, Parallel(1, "ddp")),
        (accelerate("FSDP", num_processes=2), None, Parallel(2, "fsdp1")),
        (accelerate("FSDP", fsdp_config={"fsdp_version": 2}), 2, Parallel(2, "fsdp2")),
        (accelerate("DEEPSPEED"), 2, Parallel(2, "zero2")),
        (accelerate("DEEPSPEED", deepspeed_config={"zero_stage": 3, "offload_param_device": "cpu"}), 2,
         Parallel(2, "zero3", offload="cpu")),
        (accelerate("DEEPSPEED", deepspeed_config={"zero_stage": 1, "offload_optimizer_device": "cpu"}), 2,
         Parallel(2, "zero1", offload="optimizer")),
        (zero(stage=0), 2, Parallel(2, "ddp")),
        (zero(stage=1), 2, Parallel(2, "zero1")),
        (zero(stage=2, offload_param=CPU), 2, Parallel(2, "zero2")),
        (zero(stage=3, offload_optimizer=CPU, reduce_bucket_size=5, overlap_comm=False, other=1), 2,
         Parallel(2, "zero3", offload="optimizer", options=(("overlap_comm", False), ("reduce_bucket_size", 5)))),
        (zero(stage=3, reduce_bucket_size=None), 2, Parallel(2, "zero3")),
        (zero(stage=2, reduce_bucket_size=2e8, contiguous_gradients="false"), 2,
         Parallel(2, "zero2", options=(("contiguous_gradients", False), ("reduce_bucket_size", 2e8)))),
        ({**zero(stage=3, zero_hpz_partition_size=1, mics_shard_size=-1), "tensor_parallel": {"autotp_size": 1}}, 2,
         Parallel(2, "zero3")),
        ({"fsdp_version": 2, "fsdp_offload_params": "false"}, 2, Parallel(2, "fsdp2")),
        ({"fsdp_offload_params": "True", "fsdp_use_orig_params": "false", "backward_prefetch": "NO_PREFETCH"}, 2,
         Parallel(2, "fsdp1", offload="cpu",
                  options=(("backward_prefetch", "NO_PREFETCH"), ("use_orig_params", False)))),
        ({"fsdp_sharding_strategy": "2"}, 2, Parallel(2, "fsdp1", reshard_after_forward=False)),
        ({"fsdp_sharding_strategy": "full_shard"}, 2, Parallel(2, "fsdp1")),
        ({"fsdp_sharding_strategy": 3}, 2, Parallel(2, "ddp")),
        ({"fsdp_reshard_after_forward": "shard_grad_op"}, 2, Parallel(2, "fsdp1", reshard_after_forward=False)),
        ({"fsdp_reshard_after_forward": False}, 2, Parallel(2, "fsdp1")),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, 2,
         Parallel(2, "fsdp2", reshard_after_forward=False)),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": "FALSE"}, 2,
         Parallel(2, "fsdp2", reshard_after_forward=False)),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": "SHARD_GRAD_OP"}, 2, Parallel(2, "fsdp2")),
        ({"fsdp_version": 2, "fsdp_offload_params": True}, 2, Parallel(2, "fsdp2", offload="cpu")),
        ({"fsdp_version": 2, "fsdp_cpu_offload": True}, 2, Parallel(2, "fsdp2", offload="cpu")),
        ({"fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": "A, B"}, 2, Parallel(2, "fsdp2", wrap=("A", "B"))),
        ({"fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": ["A"]}, 2, Parallel(2, "fsdp2", wrap=("A",))),
        ({"fsdp_use_orig_params": True, "fsdp_forward_prefetch": None}, 2,
         Parallel(2, "fsdp1", options=(("use_orig_params", True),))),
        ({"cpu_offload": True}, 2, Parallel(2, FSDP, offload="cpu")),
        (dimensions(dp_replicate_size=2), None, Parallel(2, "ddp")),
        (dimensions(parallelism_config_dp_replicate_size=2, dp_shard_size=1), None, Parallel(2, "ddp")),
        (dimensions(dp_shard_size=4), None, Parallel(4, "fsdp2")),
        (dimensions(dp_replicate_size=2, dp_shard_size=4), None, Parallel(8, "hsdp", shard_size=4)),
        (dimensions(tp_size=2), None, Parallel(2, "tp")),
        (dimensions(tp_size=1), None, Parallel(1, "ddp")),
    ],
)  # fmt: skip
def test_how_a_configuration_shares_a_step(given: dict[str, Any], gpus: int | None, wanted: Parallel) -> None:
    assert read_parallel(given, gpus) == wanted


@pytest.mark.parametrize(
    ("given", "gpus", "words"),
    [
        (accelerate("TPU"), 2, "distributed_type TPU is not known"),
        (accelerate("FSDP", fsdp_config="x"), 2, "fsdp_config must be a mapping, not 'x'"),
        (zero(stage=4), 2, "no stage from 0 to 3, but 4"),
        (zero(), 2, "no stage from 0 to 3, but None"),
        (zero(stage=2), None, "give gpus="),
        (accelerate("MULTI_GPU"), None, "give gpus="),
        (accelerate("FSDP", fsdp_config={"fsdp_version": 2}), None, "give gpus="),
        (zero(stage=3, zero_hpz_partition_size=8), 8, "zero_hpz_partition_size of DeepSpeed is not known"),
        (zero(stage=3, zero_quantized_nontrainable_weights=True), 8, "zero_quantized_nontrainable_weights"),
        (
            {**zero(stage=2), "tensor_parallel": {"autotp_size": 4}},
            8,
            "tensor_parallel of DeepSpeed is not known",
        ),
        ({"fsdp_version": 2}, None, "give gpus="),
        ({"fsdp_sharding_strategy": "4"}, 2, "HYBRID_SHARD of FSDP1 is not known"),
        ({"zero_optimization": 3}, 2, "no DeepSpeed configuration"),
        ({"learning_rate": 1}, 2, "it is no accelerate configuration"),
        (dimensions(tp_size=2, dp_shard_size=2), None, "with dp_shard and tp is not known"),
        (dimensions(cp_size=2), None, "with cp is not known"),
    ],
)
def test_what_shares_no_step(given: dict[str, Any], gpus: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_parallel(given, gpus)


def test_configurations_in_files(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(zero(stage=3)))
    (tmp_path / "a.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: ds.json}\n"
    )
    assert read_parallel(tmp_path / "a.yaml", None) == Parallel(2, "zero3")
    assert read_parallel(str(tmp_path / "ds.json"), 3) == Parallel(3, "zero3")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.json").write_text("{")
    for name, words in (
        ("none", "there is no file"),
        ("list.yaml", "no mapping"),
        ("broken.json", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=words):
            read_parallel(tmp_path / name, 2)
    with pytest.raises(TypeError, match="parallel must be the path"):
        read_parallel(3, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_activation_checkpointing": "true"}},
            SaidOfStep(True),
        ),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_activation_checkpointing": False}}, SaidOfStep()),
        ({"fsdp_version": 2, "activation_checkpointing": True}, SaidOfStep(True)),
        ({"distributed_type": "FSDP", "mixed_precision": "bf16"}, SaidOfStep(False, "bf16")),
        ({"distributed_type": "NO", "mixed_precision": "No"}, SaidOfStep(False, "no")),
        ({**zero(stage=2), "bf16": {"enabled": True}, "fp16": {"enabled": False}}, SaidOfStep(False, "bf16")),
        ({**zero(stage=2), "fp16": {"enabled": "true"}}, SaidOfStep(False, "fp16")),
        ({**zero(stage=2), "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, SaidOfStep()),
        (zero(stage=2), SaidOfStep()),
    ],
)
def test_what_configurations_say_of_a_step_beside_how_it_is_shared(given: Any, said: SaidOfStep) -> None:
    assert said_of_step(given) == said


def test_a_deepspeed_file_counts_and_not_the_precision_beside_it(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({**zero(stage=3), "fp16": {"enabled": True}}))
    (tmp_path / "plain.json").write_text(json.dumps(zero(stage=3)))
    for name, precision in (("ds.json", "fp16"), ("plain.json", "")):
        written = tmp_path / "accelerate.json"
        part = {"deepspeed_config_file": name}
        written.write_text(json.dumps(accelerate("DEEPSPEED", mixed_precision="bf16", deepspeed_config=part)))
        assert said_of_step(written) == SaidOfStep(False, precision)


SMALL: Any = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=6, vocab_size=320
)
SAID: dict[str, Any] = accelerate(
    "FSDP", num_processes=2, mixed_precision="bf16", fsdp_config={"fsdp_activation_checkpointing": True}
)


def test_what_a_configuration_says_reaches_the_setting_unless_it_is_given() -> None:
    read = checked_setting(parallel=SAID, dtype="float32")
    assert (read.gradient_checkpointing, read.autocast) == (True, "bfloat16")
    agreed = checked_setting(parallel=SAID, gradient_checkpointing=True, autocast="bf16")
    assert (agreed.gradient_checkpointing, agreed.autocast) == (True, "bfloat16")
    assert checked_setting(parallel={**SAID, "mixed_precision": "fp16"}, autocast=True).autocast == "float16"
    off = {**SAID, "mixed_precision": "no", "fsdp_config": {"fsdp_activation_checkpointing": False}}
    assert checked_setting(parallel=off).autocast == ""
    # accelerate writes "no" where nothing is asked for, and a trainer's bf16=True counts over it.
    assert checked_setting(parallel=off, autocast=True, gradient_checkpointing=True).autocast == "bfloat16"
    unsaid = checked_setting(parallel={**zero(stage=2)}, gpus=2)
    assert (unsaid.gradient_checkpointing, unsaid.autocast) == (False, "bfloat16")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"gradient_checkpointing": False},
            "gradient_checkpointing: parallel says activation_checkpointing True, ",
        ),
        (
            {"gradient_checkpointing": "reentrant"},
            "gradient_checkpointing 'reentrant'; leave one of them out",
        ),
        ({"autocast": False}, "autocast: parallel says mixed_precision 'bf16', autocast False; leave one"),
        ({"autocast": "float16"}, "autocast: parallel says mixed_precision 'bf16', autocast 'float16'"),
        ({"parallel": {**SAID, "mixed_precision": "fp8"}}, "parallel: mixed_precision 'fp8' is not known"),
    ],
)
def test_what_contradicts_a_configuration_is_refused_and_both_are_named(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        checked_setting(**{"parallel": SAID, **given})


def test_arguments_of_a_trainer_that_switch_nothing_on_leave_it_to_the_configuration(tmp_path: Path) -> None:
    plain = transformers.TrainingArguments(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def found(parallel: Any) -> tuple[Any, str]:
        setting = estimate_memory(config, SMALL, args=plain, seq_len=16, parallel=parallel).setting
        return setting.gradient_checkpointing, setting.autocast

    zero2 = accelerate("DEEPSPEED", num_processes=2)
    assert found(zero2) == (False, "")
    assert found({**zero2, "mixed_precision": "fp16"}) == (False, "float16")
    assert (
        found({**SAID, "fsdp_config": {"fsdp_version": 2, "fsdp_activation_checkpointing": True}})[0] is True
    )


def test_alternatives_of_a_step_keep_what_its_configuration_says() -> None:
    """FSDP that divides nothing is DDP, and with the weights divided it still checkpoints."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    asked: dict[str, Any] = {"batch_size": 2, "seq_len": 256, "strategy": "zero3"}
    whole = {"fsdp_sharding_strategy": "NO_SHARD", "fsdp_activation_checkpointing": True}
    setting = {"parallel": accelerate("FSDP", num_processes=2, fsdp_config=whole)}
    estimate = estimate_memory(config, SMALL, batch_size=2, seq_len=256, **setting)
    found = alternatives(SMALL, config, setting, estimate, estimate.peak_allocated)
    tried = {one.changes: one.peak_allocated for one in found}
    checkpointed, plain = (
        estimate_memory(config, SMALL, gpus=2, gradient_checkpointing=on, **asked) for on in (True, False)
    )
    assert tried[('strategy="zero3"',)] == checkpointed.peak_allocated < plain.peak_allocated
