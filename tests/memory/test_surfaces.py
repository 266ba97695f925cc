"""What is said of a step without a trace of it is what a trace says, to the byte; or it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import transformers
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory import step as step_module
from pytest_lora.inspection.memory.dry_run import trace
from pytest_lora.inspection.memory.layer_stacks import Cut, cut_stacks
from pytest_lora.inspection.memory.monomials import NotMonomialError, Total, further_points, products
from pytest_lora.inspection.memory.predictor import Predictor
from pytest_lora.inspection.memory.sizes import Family
from pytest_lora.inspection.skeleton import resolve_base
from pytest_lora.memory.setting import checked_setting

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 320}
BASES: dict[str, Any] = {
    "llama": lambda layers: transformers.LlamaConfig(
        **SMALL, num_hidden_layers=layers, num_key_value_heads=2
    ),
    "gpt2": lambda layers: transformers.GPT2Config(n_embd=64, n_head=4, n_layer=layers, vocab_size=320),
    "bert": lambda layers: transformers.BertConfig(**SMALL, num_hidden_layers=layers),
    "t5": lambda layers: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=layers, num_heads=4, decoder_start_token_id=0
    ),
}
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DoRA, nf4": (
        "llama",
        {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
        {"quantization": "nf4", "gradient_checkpointing": True},
    ),
    "rsLoRA, a rank of its own": (
        "llama",
        {"use_rslora": True, "target_modules": r"(.*\.)?(k_proj|down_proj)", "rank_pattern": {"k_proj": 3}},
        {"outputs_held": True},
    ),
    "PiSSA, modules to save": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"padding_mask": True, "accumulation": 2},
    ),
    "dropout, a chosen layer": (
        "gpt2",
        {"lora_dropout": 0.1, "target_modules": ["c_attn"], "layers_to_transform": [3]},
        {},
    ),
    "classifier, small states in 32 bits": ("bert", {"lora_bias": True}, {"optimizer": "adamw_8bit"}),
    "encoder and decoder": ("t5", {}, {"autocast": False}),
    "ZeRO-3, small parameters whole": ("llama", {}, {"gpus": 4, "strategy": "zero3"}),
    "FSDP2, ranks that it cannot divide": ("llama", {}, {"gpus": 2, "strategy": "fsdp2"}),
    "ZeRO-2, small states in 32 bits": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"]},
        {"gpus": 4, "strategy": "zero2", "optimizer": "adamw_8bit", "accumulation": 2},
    ),
}
POINTS = (
    (2, 30, 6),
    (3, 41, 10),
    (7, 260, 64),
    (1, 57, 1),
    (1, 120, 5),
    (4, 90, 1),
    (5, 34, 2),
    (4, 70, 6),
    (6, 99, 6),
)


def _points() -> Iterator[Any]:
    """Each case at the first point and half of the others; at all of them is slow."""
    first, *others = POINTS
    for name in CASES:
        half = others[::2] if name in ("DoRA, nf4", "PiSSA, modules to save") else others[1::2]
        yield pytest.param(name, (first, *half), id=name)
        yield pytest.param(name, POINTS, id=f"{name}, everywhere", marks=pytest.mark.lora_slow)


@pytest.mark.parametrize(("name", "points"), list(_points()))
def test_steps_that_were_not_traced_are_what_a_trace_says(
    name: str, points: tuple[tuple[int, int, int], ...]
) -> None:
    kind, fields, setting = CASES[name]
    config = LoraConfig(
        **{
            "r": 4,
            "target_modules": "all-linear",
            "task_type": TASKS.get(kind, "CAUSAL_LM"),
            "fan_in_fan_out": kind == "gpt2",
            **fields,
        }
    )
    predictor = Predictor(BASES[kind](6), config, checked_setting(**setting))
    said = {point: predictor._at(point) for point in points}
    run = predictor._traced if predictor._recordings is None else predictor._recordings._traced
    composed = [point for point in points if point not in run]
    assert composed
    predictor._recordings = None  # so that a step is run
    for point in sorted(composed, key=lambda point: point[2]):  # a model is built for each rank anew
        step = predictor._step(point)
        found = said[point]
        assert (found.sizes.tolist(), found.paged, found.flops) == (step.sizes, step.paged, step.flops)
        assert found.shape.step.events == step.events


WAYS: dict[str, dict[str, Any]] = {
    "fsdp1": {"strategy": "fsdp1"},
    "fsdp2": {"strategy": "fsdp2"},
    "hsdp": {"strategy": "hsdp", "shard_size": 2},
    "ddp": {"strategy": "ddp"},
    "zero3": {
        "parallel": Parallel(
            4, "zero3", options=(("stage3_param_persistence_threshold", 6 * SMALL["hidden_size"]),)
        )
    },
}


@pytest.mark.parametrize("packed", [pytest.param(True, marks=pytest.mark.lora_slow), False])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.lora_slow] * (way in ("hsdp", "ddp"))) for way in WAYS]
)
def test_after_its_first_answer_a_shared_step_is_run_no_more_and_said_to_the_byte(
    monkeypatch: pytest.MonkeyPatch, way: str, packed: bool
) -> None:
    """With one sequence and several, and with ranks on both sides of ZeRO-3's threshold, which is 6 here."""
    traces: list[StepSetting] = []

    def counted(built: Any, setting: StepSetting, **how: Any) -> Any:
        traces.append(setting)
        return trace(built, setting, **how)

    monkeypatch.setattr(step_module, "trace", counted)
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"
    )
    setting = checked_setting(
        **{
            "gpus": 4,
            "gradient_checkpointing": not packed,
            "quantization": stored if packed else None,
            **WAYS[way],
        }
    )
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    base = transformers.LlamaConfig(**{**SMALL, "vocab_size": 1009}, num_hidden_layers=12)
    predictor, exact = (Predictor(base, config, setting) for _ in range(2))
    exact._learns_ahead, exact._recordings = False, None
    predictor.estimate(1, 30, 4)
    first = len(traces)
    ranks = (8, 12) if way in ("fsdp2", "hsdp") else (6, 7)
    points = [(3, 41, ranks[0]), (1, 57, ranks[1])]
    said = [(predictor.estimate(*point), predictor._at(point)) for point in points]
    assert first <= 6
    assert len(traces) == first
    for point, (estimate, answer) in zip(points, said, strict=True):
        assert estimate == exact.estimate(*point)
        step = exact._traced[point].step
        assert (answer.sizes.tolist(), answer.flops) == (step.sizes, step.flops)
    if way == "zero3":
        several, one = (len(answer.sizes) for _, answer in said)
        assert several > one + 3, (
            "from rank 7 on most factors are divided, and no longer whole beside their part"
        )


LAYERS: dict[str, dict[str, Any]] = {
    "regular expression": {"target_modules": r"(.*\.)?(q_proj|up_proj)"},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [7]},
    "rank pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}},
    "an excluded one": {"target_modules": "all-linear", "exclude_modules": r".*layers\.3\..*v_proj"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_adapted_alike_stand_for_one_another(name: str) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **LAYERS[name])
    setting = checked_setting(quantization="nf4", gradient_checkpointing=name != "one layer")
    cut, whole = (Predictor(BASES["llama"](15), config, setting) for _ in range(2))
    whole._cut = Cut(0)
    found, truth = (predictor.estimate(2, 30, 4) for predictor in (cut, whole))
    assert any(built.stacks for built in cut._models.values())
    assert not any(built.stacks for built in whole._models.values())
    assert max(point.peak for point in found.timeline) == max(point.peak for point in truth.timeline)
    assert replace(found, timeline=()) == replace(truth, timeline=())


def test_runs_on_both_sides_of_a_layer_are_cut() -> None:
    model = resolve_base(BASES["llama"](20))
    stacks = cut_stacks(model, mark=lambda name: name == "model.layers.8.self_attn.q_proj")
    assert [stack.copies for stack in stacks] == [5, 8]
    assert model.get_submodule("model.layers.8") is not None


def test_what_is_no_product_is_refused() -> None:
    first = (2, 30, 6)
    second, third, *_ = further_points(first, Family(first, []))
    points = [first, second, third]

    def values(size: Any) -> list[list[int]]:
        return [[size(*point)] for point in points]

    for right in (lambda b, n, r: 12 * b * n, lambda b, n, r: 8 * b * (n + 1), lambda b, n, r: b * n * n):
        (term,) = products(points[:2], values(right)[:2])
        assert Total([term], [3])((5, 77, 9)) == 3 * right(5, 77, 9)
    for wrong in (lambda b, n, r: 64 + 8 * r, lambda b, n, r: -(-b * n // 128)):
        with pytest.raises(NotMonomialError):
            products(points[:2], values(wrong)[:2])
    (term,) = products(points, values(lambda b, n, r: 64 + 8 * r))
    assert Total([term], [1])((5, 77, 9)) == 64 + 8 * 9
    with pytest.raises(NotMonomialError):
        products(points, values(lambda b, n, r: b * n + n * r))


def test_lengths_that_mean_something_else_are_not_traced() -> None:
    first = (2, 30, 6)
    lengths = {length for _, length, _ in further_points(first, Family(first, []))}
    other = next(further_points(first, Family(first, []), avoided=lengths), None)
    assert other is None or other[1] not in lengths
