"""A step on several GPUs, predicted without any: the part of the fullest rank."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import (
    check_memory,
    check_recipe,
    estimate_memory,
    largest_that_fits,
    oom_frontier,
    run_distributed,
)
from pytest_lora.facts.memory import MemoryEstimate
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory import dry_run
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.inspection.parallel_files import read_parallel
from pytest_lora.memory.setting import checked_setting
from pytest_lora.strategies.shapes import TrainingShape, training_shapes
from tests.forked import fork_ranks
from tests.memory import sharded_ranks

BASE: Any = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_hidden_layers=13,
    vocab_size=4000,
    tie_word_embeddings=False,
)
LORA = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def cuts_by_plan() -> bool:
    try:
        importlib.import_module("transformers.distributed.tensor_parallel")
    except ImportError:
        return False
    return True


def estimated(base: Any = BASE, **setting: Any) -> MemoryEstimate:
    return estimate_memory(LORA, base, **{"batch_size": 2, "seq_len": 64, **setting})


def held(estimate: MemoryEstimate, *categories: str) -> int:
    return sum(estimate.breakdown.get(name, 0) for name in categories)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpus": 0}, "gpus must be at least 1"),
        ({"gpus": 2.0}, "gpus must be a whole number"),
        ({"gpus": 2, "strategy": "zero4"}, "strategy must be one of ddp, fsdp1, fsdp2, .* did you mean"),
        ({"gpus": 2, "strategy": "ddp", "offload": "cpu"}, "offload: ddp keeps everything"),
        ({"gpus": 2, "strategy": "zero2", "offload": "cpu"}, 'offload: zero2 .* offload="optimizer"'),
        ({"gpus": 2, "strategy": "fsdp", "offload": "disk"}, "offload must be one of cpu, optimizer"),
        ({"offload": "cpu"}, "offload: it is known for several GPUs"),
        ({"gpus": 2, "strategy": "zero3", "wrap": ["Layer"]}, "wrap: zero3 does not gather"),
        ({"gpus": 2, "strategy": "fsdp", "wrap": "Layer"}, "wrap must be a list of names"),
        ({"gpus": 2, "reshard_after_forward": False}, "reshard_after_forward: ddp has no such"),
        ({"gpus": 2, "strategy": "fsdp", "reshard_after_forward": 1}, "reshard_after_forward must be"),
        ({"parallel": 3}, "parallel must be the path"),
        ({"parallel": "nowhere.yaml"}, "parallel: there is no file"),
        ({"gpus": 2, "parallel": {"learning_rate": 1}}, "parallel: it is no accelerate configuration"),
        ({"parallel": {"zero_optimization": {"stage": 3}}}, "gpus: this configuration does not say"),
        (
            {"gpus": 2, "parallel": {"zero_optimization": {"stage": 7}}},
            "parallel: zero_optimization has no stage",
        ),
        ({"parallel": {"distributed_type": "TPU"}}, "parallel: distributed_type TPU is not known"),
        (
            {"gpus": 2, "strategy": "ddp", "parallel": {"zero_optimization": {"stage": 2}}},
            "strategy: parallel says 'zero2'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        checked_setting(**wrong)


def test_a_class_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match="wrap: LlamaForCausalLM has no module of class 'LlamaDecoder'; did you mean"
    ):
        estimated(gpus=2, strategy="fsdp", wrap=["LlamaDecoder"])


def test_one_gpu_is_as_if_none_were_named() -> None:
    assert estimated(gpus=1, strategy="fsdp") == estimated()


def test_a_rank_holds_its_part_of_the_weights() -> None:
    alone = estimated()
    weights = held(alone, "base weights", "embeddings and head")
    for strategy in ("fsdp1", "fsdp2", "zero3"):
        shared = estimated(gpus=4, strategy=strategy)
        assert held(shared, "parameter shards") == pytest.approx(weights / 4, rel=0.02), strategy
        assert shared.over_ranks == 4 * shared.peak_allocated
    for strategy in ("zero1", "zero2", "ddp"):
        shared = estimated(gpus=4, strategy=strategy)
        assert held(shared, "base weights", "embeddings and head") == pytest.approx(weights, rel=0.01), (
            strategy
        )


def test_buckets_are_as_large_as_all_gradients_and_views_of_them_cost_nothing_more() -> None:
    alone, shared = estimated(), estimated(gpus=2, strategy="ddp")
    assert held(shared, "buckets") == held(alone, "adapters")
    views = {"distributed_type": "MULTI_GPU", "num_processes": 2}
    assert read_parallel(views, None) == Parallel(2, "ddp")
    large = LoraConfig(r=128, target_modules="all-linear", task_type="CAUSAL_LM")
    asked = {"batch_size": 1, "seq_len": 2, "optimizer": "sgd"}
    parallel = Parallel(2, "ddp", options=(("gradient_as_bucket_view", True),))
    viewed = estimate_memory(large, BASE, parallel=parallel, **asked)
    shared = estimate_memory(large, BASE, gpus=2, **asked)
    assert viewed.peak_allocated < 0.9 * shared.peak_allocated
    assert shared.by_formula == viewed.by_formula != ()


def test_zero_divides_the_optimizer_and_takes_a_bucket_of_the_size_that_is_given() -> None:
    small = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    auto = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    shared = estimated(gpus=4, parallel=small)
    assert held(shared, "reduce buffers") == 2048, "in bfloat16, as CUDA rounds it"
    assert held(estimated(gpus=4, parallel=auto), "reduce buffers") == 2 * 256**2
    # A float32 copy and two moments of a quarter, and the adapter in 16 bits.
    adapters = held(estimated(), "adapters")
    assert held(shared, "optimizer") == pytest.approx(3 * adapters / 4, rel=0.05)
    assert held(shared, "adapters") == adapters / 2


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    for strategy in ("fsdp1", "fsdp2", "zero3"):
        here, there = (estimated(gpus=4, strategy=strategy, offload=o) for o in (None, "cpu"))
        assert held(there, "parameter shards", "optimizer") == 0, strategy
        assert there.peak_allocated < here.peak_allocated
        assert there.by_formula


def test_weights_that_stay_gathered_after_the_forward_cost_more() -> None:
    for strategy in ("fsdp1", "fsdp2"):
        peaks = [
            estimated(gpus=4, strategy=strategy, reshard_after_forward=r).peak_allocated
            for r in (True, False)
        ]
        assert peaks[1] > 1.1 * peaks[0], strategy


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_left_out_count_as_if_they_were_run(strategy: str, checkpointing: bool) -> None:
    """The whole model is run where ranks differ by layer."""
    whole = replace(LORA, rank_pattern={"layers.0.self_attn.q_proj": 8})
    asked = {"batch_size": 2, "seq_len": 64, "gpus": 4, "strategy": strategy}
    short, long = (
        estimate_memory(config, BASE, gradient_checkpointing=checkpointing, **asked)
        for config in (LORA, whole)
    )
    assert short.peak_allocated == long.peak_allocated
    assert short.breakdown == long.breakdown
    assert short.after_step == long.after_step


def test_packed_weights_are_divided_where_they_are_stored_as_floats() -> None:
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"
    )
    alone = estimated(quantization=packed)
    for strategy in ("fsdp1", "fsdp2"):
        shared = estimated(quantization=packed, gpus=4, strategy=strategy)
        assert held(shared, "quantization statistics") == held(alone, "quantization statistics")
        assert (
            held(shared, "parameter shards")
            < held(alone, "quantized base weights", "embeddings and head") / 3
        )


def test_what_fsdp1_refuses_is_refused_with_what_to_write() -> None:
    with pytest.raises(
        ValueError, match=r"strategy: FSDP1 refuses this model: .*bnb_4bit_quant_storage='bfloat16'"
    ):
        estimated(quantization="nf4", gpus=2, strategy="fsdp1")


def test_nothing_of_the_ranks_stays_in_the_process() -> None:
    resize = vars(torch.UntypedStorage).get("resize_")
    call = torch._C._get_accelerator
    estimated(gpus=3, strategy="fsdp1")
    assert not torch.distributed.is_initialized()
    assert not hasattr(torch, "meta")
    assert vars(torch.UntypedStorage).get("resize_") is resize
    assert torch._C._get_accelerator is call


def test_a_running_process_group_is_named() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="gpus: this process is a rank of a running process group"):
            estimated(gpus=5, strategy="fsdp2")
    finally:
        torch.distributed.destroy_process_group()


def test_a_budget_names_its_cards_and_what_stays_on_each() -> None:
    zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    asked = {"batch_size": 1, "seq_len": 16, "parallel": zero}
    report = check_memory(LORA, BASE, budget="4x16MiB", **asked)
    (found,) = [f for f in report.errors if f.code == "LORA501"]
    assert "the fullest of 4 GPUs, zero2" in found.where
    assert "zero2 does not divide the weights: 20.2 MiB" in found.observed
    assert 'strategy="fsdp"' in found.fix
    with pytest.raises(ValueError, match="budget: '4x16MiB' names 4 cards, and gpus 2"):
        check_memory(LORA, BASE, budget="4x16MiB", gpus=2, **asked)
    with pytest.raises(ValueError, match="names no card"):
        check_memory(LORA, BASE, budget="0x16MiB", **asked)


def test_more_cards_take_larger_batches_only_where_the_weights_are_divided() -> None:
    def largest(budget: str, strategy: str) -> int:
        return largest_that_fits(LORA, BASE, budget, vary="batch_size", seq_len=64, strategy=strategy)

    assert largest("1x64MiB", "fsdp") < largest("2x64MiB", "fsdp") < largest("8x64MiB", "fsdp")
    assert largest("1x64MiB", "ddp") >= largest("8x64MiB", "ddp")
    rows = oom_frontier(LORA, BASE, "2x64MiB", strategy="fsdp", seq_lens=[64]).rows
    assert rows[0].batch_size == largest("2x64MiB", "fsdp")


@given(training_shapes(gpus=[1, 2], strategies=["fsdp2", "zero3"], max_batch_size=2, max_seq_len=8))
def test_shapes_of_a_step_have_their_gpus(shape: TrainingShape) -> None:
    assert shape.gpus in (1, 2)
    assert shape.strategy == "ddp" if shape.gpus == 1 else shape.strategy in ("fsdp2", "zero3")
    checked_setting(gpus=shape.gpus, strategy=shape.strategy)


RECIPE = """
base_model: NousResearch/Llama-2-70b-hf
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
sequence_len: 2048
micro_batch_size: 1
gradient_checkpointing: true
bf16: true
learning_rate: 0.0002
datasets:
  - path: data.jsonl
    type: alpaca
"""


def test_a_recipe_on_several_cards_is_estimated_as_it_shares_them(tmp_path: Path) -> None:
    recipe = tmp_path / "fsdp.yaml"

    def codes(text: str, budget: str) -> set[str]:
        recipe.write_text(RECIPE + text)
        return {
            f.code for f in check_recipe(recipe, gpus=8, budget=budget).findings if f.code.startswith("LORA5")
        }

    sharded = "fsdp_config:\n  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer\n"
    assert not codes(sharded, "40GiB"), "the weights alone are 129 GiB"
    assert codes(sharded, "18GiB"), "a part of them is 16 GiB, and a layer is gathered"
    assert not codes(sharded + "  fsdp_offload_params: true\n", "18GiB")
    recipe.write_text(RECIPE + sharded + "  fsdp_version: 2\n")
    (found,) = [f for f in check_recipe(recipe, gpus=8, budget="16500MiB").findings if f.code == "LORA501"]
    assert "fullest of 8 GPUs, fsdp2" in found.where


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_processes: 8
fsdp_config:
  fsdp_version: 1
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_POST
  fsdp_offload_params: true
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_use_orig_params: true
"""


def test_configurations_of_accelerate_deepspeed_and_fsdp_are_read(tmp_path: Path) -> None:
    written = tmp_path / "accelerate.yaml"
    written.write_text(ACCELERATE)
    assert read_parallel(written, None) == Parallel(
        8,
        "fsdp1",
        offload="cpu",
        reshard_after_forward=False,
        wrap=("LlamaDecoderLayer",),
        options=(("backward_prefetch", "BACKWARD_POST"), ("use_orig_params", True)),
    )
    assert read_parallel(str(written), 4).gpus == 4
    zero = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1e6}
    }
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    assert read_parallel(tmp_path / "zero3.json", 2) == Parallel(
        2, "zero3", offload="optimizer", options=(("reduce_bucket_size", 1e6),)
    )
    by_file = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 2,
        "deepspeed_config": {"deepspeed_config_file": "zero3.json"},
    }
    (tmp_path / "accelerate.json").write_text(json.dumps(by_file))
    assert read_parallel(tmp_path / "accelerate.json", None).strategy == "zero3"
    plain = {
        "version": 2,
        "reshard_after_forward": "false",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    assert read_parallel(plain, 2) == Parallel(
        2, "fsdp2", reshard_after_forward=False, wrap=("LlamaDecoderLayer",)
    )
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"parallel: .*list\.yaml' is no accelerate configuration"):
        read_parallel(tmp_path / "list.yaml", 2)


@pytest.mark.lora_slow
def test_two_ranks_allocate_what_is_predicted_and_train_as_one_process_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP2 on the CPU with gloo, followed by the tracker of the prediction."""
    fork_ranks(monkeypatch)
    ranks = run_distributed(sharded_ranks.measured_and_trained, sharded_ranks.RANKS)
    setting = checked_setting(dtype="float32", autocast=False, gpus=sharded_ranks.RANKS, strategy="fsdp2")
    setting = replace(setting, batch_size=sharded_ranks.BATCH, seq_len=sharded_ranks.LENGTH)
    built = build(sharded_ranks.base(), sharded_ranks.adapter(), setting, cut=Cut(0))
    predicted = {
        "held": sum(weight.size for weight in built.held()),
        "added": sharded_ranks.peak_of(dry_run.trace(built, setting)),
        "optimizer": sum(2 * 4 * part.numel for part in built.trained()),
    }
    for real, _ in ranks:
        for name, size in predicted.items():
            assert size == pytest.approx(real[name], rel=0.01), name

    start = {n: p.detach() for n, p in sharded_ranks.packed_model().named_parameters() if p.requires_grad}
    batches = [sharded_ranks.batch(rank) for rank in range(sharded_ranks.RANKS)]
    alone = sharded_ranks.trained(sharded_ranks.packed_model(), batches)
    for _, shards in ranks:
        for name, weight in alone.items():
            assert torch.allclose(shards[name], weight, atol=1e-6), name
    assert any((alone[name] - start[name]).abs().max() > 1e-3 for name in alone), "something was learned"


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2", "hsdp", *(["tp"] if cuts_by_plan() else [])])
def test_the_step_that_is_traced_is_none_of_the_first_ones_own(strategy: str) -> None:
    asked = checked_setting(gpus=4, strategy=strategy, gradient_checkpointing=True)
    built = build(BASE, LORA, asked)
    setting = replace(asked, batch_size=1, seq_len=64)
    first, second = (dry_run.trace(built, setting) for _ in range(2))
    assert (first.events, first.operations, first.categories) == (
        second.events,
        second.operations,
        second.categories,
    )
    assert not [name for name in first.operations if name.startswith("profiler")]
