"""What one rank holds under DDP and ZeRO, in bytes worked out by hand, and the predicted step of a tiny base."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import estimate_memory
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.meta_model import MetaModel, build
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE
from pytest_lora.memory.setting import checked_setting


def base(layers: int = 1) -> Any:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=320,
        tie_word_embeddings=False,
    )


LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
"""Two factors of 256 numbers a layer."""

EMBEDDED, LAYER, NORMS = 2 * 320 * 64, 4 * 64 * 64 + 3 * 64 * 128, 3 * 64
"""Numbers of embedding and head, of the matrices of a layer, of all norms."""

NEW = int(transformers.__version__.partition(".")[0]) > 4

FREQUENCIES = [32] * (2 if NEW else 1)
"""Bytes of the buffers of rotary frequencies; transformers 5 registers the original ones too."""

ROTARY = sum(FREQUENCIES)

WHOLE = {"embeddings and head": 2 * EMBEDDED, "base weights": 2 * (LAYER + NORMS) + ROTARY}


def built(strategy: str, layers: int = 1, autocast: bool | None = None, **more: Any) -> MetaModel:
    options = tuple(more.pop("options", {}).items())
    parallel = Parallel(3, strategy, options=options, **more)
    return build(base(layers), LORA, checked_setting(parallel=parallel, autocast=autocast))


def held(model: MetaModel) -> dict[str, int]:
    found: Counter[str] = Counter()
    for weight in model.held():
        found[weight.category] += weight.size
    return dict(found)


AUTO = {"reduce_bucket_size": "auto"}
SMALL_BUCKET = 64**2 * 2


@pytest.mark.parametrize(
    ("strategy", "more", "beside"),
    [
        ("ddp", {}, {"adapters": 2048, "buckets": 2048}),
        ("zero1", {}, {"adapters": 1024, "optimizer": 2 * 86 * 4, "reduce buffers": 10**9}),
        (
            "zero2",
            {"options": AUTO},
            {
                "adapters": 1024,
                "optimizer": 2 * 86 * 4,
                "gradients": 2 * 86 * 2,
                "reduce buffers": SMALL_BUCKET,
            },
        ),
        (
            "zero2",
            {"options": {"reduce_bucket_size": 5, "overlap_comm": True}},
            {"adapters": 1024, "optimizer": 688, "gradients": 344, "reduce buffers": 2 * 5 * 2},
        ),
        (
            "zero2",
            {"options": {"reduce_bucket_size": 5e0, "overlap_comm": True, "contiguous_gradients": False}},
            {"adapters": 1024, "optimizer": 688, "gradients": 344, "reduce buffers": 5 * 2},
        ),
        (
            "zero2",
            {"options": {**AUTO, "contiguous_gradients": False}, "offload": "optimizer"},
            {"adapters": 1024, "reduce buffers": SMALL_BUCKET},
        ),
        (
            "zero2",
            {"options": AUTO, "offload": "optimizer"},
            {"adapters": 1024, "reduce buffers": SMALL_BUCKET},
        ),
        (
            "zero2",
            {"options": AUTO, "autocast": False},
            {"adapters": 2048, "gradients": 2 * 86 * 4, "reduce buffers": 2 * SMALL_BUCKET},
        ),
    ],
)
def test_weights_that_are_whole_on_each_rank(
    strategy: str, more: dict[str, Any], beside: dict[str, int]
) -> None:
    model = built(strategy, **more)
    assert held(model) == WHOLE | beside
    assert model.rank is not None
    assert model.rank.notices_gradients is (strategy != "zero2")
    numbers = [trained.numel for trained in model.trained()]
    assert numbers == ([] if "offload" in more else [256, 256] if strategy == "ddp" else [86, 86])


def third(numbers: int) -> int:
    return -(-numbers // 3)


SHARDS = 2 * (2 * third(20480) + 4 * third(4096) + 3 * third(8192) + 3 * third(64))
KEPT_WHOLE = 2 * (2 * 256 + NORMS)
"""Bytes of what ZeRO-3 keeps whole: the factors, and the norms."""


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, 2 * (EMBEDDED + LAYER) + KEPT_WHOLE),  # all are small; nothing is left to gather
        (
            # 0.9 x 64 x 64 numbers are gathered ahead, which each matrix has alone; all but the embeddings stays.
            {"stage3_param_persistence_threshold": "auto", "stage3_prefetch_bucket_size": "auto"},
            2 * (EMBEDDED // 2 + LAYER) + KEPT_WHOLE,
        ),
        (
            {"stage3_param_persistence_threshold": 256, "stage3_prefetch_bucket_size": 0},
            2 * (EMBEDDED // 2 + LAYER) + KEPT_WHOLE,
        ),
        (
            {
                "stage3_param_persistence_threshold": 255,
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_reuse_distance": 1,
            },
            2 * (20480 + 2 * 256) + 2 * NORMS,  # the head, and the factors of a layer
        ),
    ],
)
def test_weights_that_are_divided(options: dict[str, Any], whole: int) -> None:
    expected = {
        "base weights": ROTARY,
        "parameter shards": SHARDS,
        "adapters": 2 * 86 * 2,
        "gathered parameters": whole,
        "optimizer": 688,
        "gradients": 344,
        "reduce buffers": SMALL_BUCKET,
    }
    assert held(built("zero3", options={**AUTO, "overlap_comm": True, **options})) == expected
    away = held(built("zero3", options={**AUTO, **options}, offload="cpu"))
    kept = ("base weights", "gathered parameters", "reduce buffers")
    assert away == {name: size for name, size in expected.items() if name in kept}


def test_layers_that_were_left_out_are_gathered_too() -> None:
    options = {"stage3_param_persistence_threshold": 255, "stage3_prefetch_bucket_size": 100}
    model = built("zero3", 8, options=options)
    assert [stack.copies for stack in model.stacks] == [5]
    assert [model.copies_of(unit) for unit in (-1, 0, 1, 2, 3, 4)] == [1, 1, 1, 4, 1, 1]
    (outside,) = [
        w.size
        for w in model.held()
        if w.category == "gathered parameters" and w.unit == OUTSIDE and w.size > 640
    ]
    factors = 2 * 2 * 256
    assert outside == EMBEDDED + 8 * 2 * LAYER + factors, "all but the embeddings"


def test_units_of_several_stacks() -> None:
    stacks: Any = [SimpleNamespace(copies=5, number=0), SimpleNamespace(copies=9, number=1)]
    model = MetaModel(model=None, stacks=stacks, unit_of={}, weights=[])
    assert [model.copies_of(unit) for unit in (2, 3, 7, 8, 12 - 5, -3)] == [4, 1, 8, 1, 8, 1]


def rounded(*sizes: int) -> int:
    return sum(-(-size // 512) * 512 for size in sizes)


def test_the_step_of_a_tiny_base_by_hand() -> None:
    config = LoraConfig(r=64, target_modules=["q_proj"], task_type="CAUSAL_LM")
    factor = 64 * 64 * 4
    weights = (
        rounded(*[2 * 20480] * 2, *[2 * 4096] * 4, *[2 * 8192] * 3, *[128] * 3, *FREQUENCIES) + 2 * factor
    )
    workspaces, states, square_roots, gradients = 2 * 8_519_680, 4 * factor, 2 * factor, 2 * factor
    found = estimate_memory(config, base(), batch_size=1, seq_len=2, optimizer="adamw_torch")
    assert found.loaded == weights
    assert found.after_step == weights + workspaces + states
    # So few tokens take less than the optimizer's step, with its roots of all second moments.
    assert found.peak_allocated == weights + workspaces + states + gradients + square_roots
    assert found.peak_phase == "optimizer"
    assert found.breakdown["gradients"] == gradients
    assert found.breakdown["optimizer"] == states + square_roots
    assert found.breakdown["workspace"] == workspaces
    # Products with four matrices of 64 x 64, three of 64 x 128, the head, the factors, and two of attention.
    forward = 2 * 2 * (4 * 64 * 64 + 3 * 64 * 128 + 64 * 320 + 2 * 64 * 64) + 2 * (2 * 4 * 2 * 2 * 16)
    forward += (
        0 if NEW else 2 * 8 * 2
    )  # transformers 4 multiplies eight frequencies with positions as matrices
    assert found.flops.forward == forward
    for accumulation in (2, 3):
        asked: dict[str, Any] = {"batch_size": 1, "seq_len": 2, "accumulation": accumulation}
        plain = estimate_memory(config, base(), optimizer="sgd", **asked)
        assert plain.after_step == weights + workspaces
        assert plain.flops.forward == accumulation * forward
