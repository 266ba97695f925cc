"""Further ways to share a step: groups that divide, layers cut by a plan, layers over GPUs, and many GPUs."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from pytest_lora import estimate_memory
from pytest_lora.facts.memory import MemoryEstimate
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.cuda_allocator import max_reserved
from pytest_lora.inspection.parallel_files import read_parallel
from pytest_lora.memory.setting import checked_setting
from tests.memory.test_parallel import BASE, cuts_by_plan, estimated, held

SHORT = LlamaConfig(**{**BASE.to_dict(), "num_hidden_layers": 4})
LORA_OF_ATTENTION = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpus": 12, "strategy": "hsdp"}, "shard_size: 12 GPUs cannot be put in groups of 8"),
        ({"gpus": 8, "strategy": "hsdp", "shard_size": 1}, "shard_size must be at least 2"),
        ({"gpus": 8, "strategy": "hsdp", "shard_size": "4"}, "shard_size must be a whole number"),
        ({"gpus": 8, "strategy": "fsdp", "shard_size": 4}, "shard_size: fsdp2 divides among all GPUs"),
        ({"gpus": 2, "strategy": "tp", "offload": "cpu"}, "offload: tp keeps everything on its GPU"),
        ({"gpus": 2, "strategy": "device_map", "wrap": ["Layer"]}, "wrap: device_map does not gather"),
        (
            {"gpus": 2, "strategy": "tp", "reshard_after_forward": False},
            "reshard_after_forward: tp has no such setting",
        ),
        (
            {"parallel": {"distributed_type": "FSDP", "parallelism_config": {"tp_size": 2, "cp_size": 2}}},
            "parallel: parallelism_config with tp and cp is not known",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        checked_setting(**wrong)


def test_dimensions_of_accelerate_are_read() -> None:
    def of(**sizes: int) -> Parallel:
        named = {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
        fsdp = {"fsdp_version": 2, "fsdp_reshard_after_forward": False}
        given = {"distributed_type": "FSDP", "parallelism_config": named, "fsdp_config": fsdp}
        return read_parallel(given, None)

    assert of(dp_replicate=2, dp_shard=4) == Parallel(8, "hsdp", reshard_after_forward=False, shard_size=4)
    assert of(dp_shard=4, tp=1) == Parallel(4, "fsdp2", reshard_after_forward=False)
    assert of(tp=4) == Parallel(4, "tp")
    assert of(dp_replicate=4) == Parallel(4, "ddp")


def test_groups_that_divide_hold_what_a_whole_group_of_that_size_does() -> None:
    alone, groups = estimated(gpus=4, strategy="fsdp"), estimated(gpus=8, strategy="hsdp", shard_size=4)
    assert groups.peak_allocated == alone.peak_allocated
    assert groups.over_ranks == 2 * alone.over_ranks
    assert groups.setting.parallel is not None
    assert groups.setting.parallel.shard_size == 4
    assert "hsdp in groups of 4" in str(groups)
    assert checked_setting(gpus=16, strategy="hsdp").parallel == Parallel(16, "hsdp", shard_size=8)


@pytest.mark.skipif(not cuts_by_plan(), reason="this transformers cuts no model into DTensors")
def test_a_model_that_is_cut_by_its_plan_holds_a_part_of_weights_and_of_what_they_make() -> None:
    alone, cut = estimated(), estimated(gpus=4, strategy="tp")
    weights = held(alone, "base weights", "embeddings and head")
    assert held(cut, "parameter shards") == pytest.approx(weights / 4, rel=0.01)
    assert held(alone, "adapters") / 4 < held(cut, "adapters") < held(alone, "adapters")  # A or B is whole
    assert held(cut, "logits and loss") == held(alone, "logits and loss")  # gathered
    assert held(cut, "activations") < 0.6 * held(alone, "activations")
    assert not cut.by_formula
    with pytest.raises(
        ValueError, match="gpus: tp gives each GPU whole heads, and 3 GPUs do not divide num_att"
    ):
        estimated(gpus=3, strategy="tp")
    with pytest.raises(
        ValueError, match="strategy: tp of a quantized base is not known; write quantization=No"
    ):
        estimated(gpus=2, strategy="tp", quantization="nf4")


@pytest.mark.skipif(cuts_by_plan(), reason="this transformers cuts models into DTensors")
def test_what_cannot_be_cut_by_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy: tp needs a transformers that cuts models into DTensors"):
        estimated(gpus=2, strategy="tp")


def test_layers_lie_on_the_gpus_where_accelerate_places_them() -> None:
    planner: Any = importlib.import_module("accelerate.utils")
    with torch.device("meta"):
        model = LlamaForCausalLM(BASE).to(torch.bfloat16)
    layers = {"no_split_module_classes": ["LlamaDecoderLayer"]}
    room = planner.get_balanced_memory(model, max_memory=dict.fromkeys(range(4), 2**40), **layers)
    plan = planner.infer_auto_device_map(model, max_memory=room, **layers)
    sizes = planner.compute_module_sizes(model)
    placed = [sum(sizes[name] for name, gpu in plan.items() if gpu == card) for card in range(4)]

    alone, spread = estimated(), estimated(gpus=4, strategy="device_map")
    weights = held(spread, "base weights", "embeddings and head")
    assert min(abs(weights - size) for size in placed) < 0.01 * weights
    # Each storage lies on one GPU, so that the peaks of all hold at least the weights, and no more than four wholes.
    assert sum(placed) < spread.over_ranks < 2 * alone.peak_allocated
    assert alone.peak_allocated / 4 < spread.peak_allocated < 0.6 * alone.peak_allocated
    assert spread.bound == "at least"
    assert spread.peak_reserved >= spread.peak_allocated
    with pytest.raises(ValueError, match="strategy: device_map is followed by layers that are alike"):
        estimated(SHORT, gpus=2, strategy="device_map")


MIXTURE: Any = MixtralConfig(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=9,
    num_local_experts=4,
    vocab_size=500,
)


def test_a_mixture_on_64_gpus_is_planned_and_says_that_no_measurement_is_behind_it() -> None:
    def on(gpus: int, strategy: str) -> MemoryEstimate:
        asked: dict[str, Any] = {"batch_size": 1, "seq_len": 16, "gpus": gpus, "strategy": strategy}
        return estimate_memory(LORA_OF_ATTENTION, MIXTURE, **asked)

    for strategy in ("fsdp2", "zero3"):
        assert f"no measured step with {strategy} on more than" in str(on(64, strategy))
    assert "no measured step" not in str(estimated(gpus=2, strategy="fsdp"))
    few, many = (held(on(gpus, "zero3"), "parameter shards") for gpus in (8, 64))
    assert many < few / 2, "an eighth, each part rounded up"
    if int(transformers.__version__.partition(".")[0]) < 5:
        return  # each expert has weights of its own there
    # fully_shard divides along the first dimension, which is that of the experts: none gets less than one.
    one_expert = 3 * MIXTURE.hidden_size * MIXTURE.intermediate_size * 2
    assert held(on(64, "fsdp2"), "parameter shards") > MIXTURE.num_hidden_layers * one_expert


@pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="each expert has layers of its own there"
)
@pytest.mark.lora_slow
@pytest.mark.parametrize("whole", [False, True], ids=["flattened", "original"])
def test_parameters_that_fsdp1_flattens_cannot_be_adapted(whole: bool) -> None:
    fsdp = {"fsdp_version": 1, "fsdp_use_orig_params": whole}
    shared = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": fsdp}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    asked: dict[str, Any] = {"batch_size": 1, "seq_len": 16}
    with pytest.raises(
        ValueError, match=r"PEFT adapts model\.layers\.\d+\.mlp\..* as a parameter, and FSDP1"
    ) as told:
        estimate_memory(config, MIXTURE, parallel=shared, **asked)
    assert 'write strategy="fsdp2"' in str(told.value)
    assert "target_modules=['q_proj', 'v_proj']" in str(told.value)
    assert estimate_memory(config, MIXTURE, gpus=4, strategy="fsdp2", **asked).peak_allocated > 0
    assert estimate_memory(LORA_OF_ATTENTION, MIXTURE, parallel=shared, **asked).peak_allocated > 0


def test_a_stream_of_its_own_takes_blocks_that_no_other_stream_takes() -> None:
    sizes = np.array([4 * 2**20, 4 * 2**20], dtype=np.int64)
    storages = np.array([0, 0, 1, 1])
    frees = np.array([False, True, False, True])
    shared = max_reserved(sizes, storages, storages, frees)
    apart = max_reserved(sizes, storages, storages, frees, streams=np.array([0, 1]))
    assert (shared, apart) == (20 * 2**20, 40 * 2**20)
    # What the device still reads is not taken again, unless it has caught up.
    wide = sizes * 5
    assert max_reserved(wide, storages, storages, frees, streams=np.array([1, 1])) == 20 * 2**20
    late = max_reserved(wide, storages, storages, frees, streams=np.array([1, 1]), caught_up=4)
    assert late == 40 * 2**20
    assert max_reserved(wide, storages, storages, frees, streams=np.array([1, 1]), caught_up=2) == 20 * 2**20
