"""Predicted memory: against figures that others measured, against whole traces, and for every kind of model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig

from benchmarks.memory_cases import CASES, GIB, adapter_of, base_of, setting_of
from pytest_lora import MemoryEstimate, StepMemory, estimate_memory, largest_that_fits, step_memory
from pytest_lora.facts.memory import Quantization, StepSetting
from pytest_lora.inspection.memory import surfaces
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.predictor import Predictor
from pytest_lora.inspection.memory.unmodelled import _cache_of_generation
from pytest_lora.inspection.skeleton import without_initial_values

SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def predicted(case: dict[str, Any]) -> MemoryEstimate:
    return estimate_memory(adapter_of(case), base_of(case), **setting_of(case))


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case["name"])
def test_reserved_memory_is_what_was_measured(case: dict[str, Any]) -> None:
    assert predicted(case).peak_reserved / case["measured"]["bytes"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("case", CASES[4:], ids=lambda case: case["name"])
def test_memory_after_a_step_is_what_was_measured(case: dict[str, Any]) -> None:
    assert predicted(case).after_step / (case["measured"]["after_step_gib"] * GIB) == pytest.approx(
        1, abs=0.015
    )


def llama(pick: random.Random, **fields: Any) -> LlamaConfig:
    heads = fields["num_attention_heads"]
    return LlamaConfig(
        **fields,
        num_key_value_heads=pick.choice([1, heads]),
        tie_word_embeddings=pick.random() < 0.5,
    )


def gpt2(pick: random.Random, **fields: Any) -> Any:
    names = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"}
    names["num_attention_heads"] = "n_head"
    return transformers.GPT2Config(**{names.get(name, name): value for name, value in fields.items()})


def t5(pick: random.Random, **fields: Any) -> Any:
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    return transformers.T5Config(
        d_model=width,
        d_kv=width // heads,
        d_ff=fields["intermediate_size"],
        num_heads=heads,
        num_layers=fields["num_hidden_layers"],
        num_decoder_layers=pick.choice([5, fields["num_hidden_layers"]]),
        vocab_size=fields["vocab_size"],
        decoder_start_token_id=0,
    )


def mixtral(pick: random.Random, **fields: Any) -> Any:
    return transformers.MixtralConfig(
        **fields, num_key_value_heads=fields["num_attention_heads"], num_local_experts=pick.choice([2, 4])
    )


def vit(pick: random.Random, **fields: Any) -> Any:
    del fields["vocab_size"]
    return transformers.ViTConfig(**fields, image_size=32, architectures=["ViTForImageClassification"])


def bert(pick: random.Random, **fields: Any) -> Any:
    return transformers.BertConfig(**fields)


KINDS: tuple[tuple[Any, str | None, tuple[str, ...]], ...] = (
    (llama, "CAUSAL_LM", ("q_proj", "v_proj")),
    (gpt2, "CAUSAL_LM", ("c_attn", "c_fc")),
    (t5, "SEQ_2_SEQ_LM", ("q", "v", "wo")),
    (bert, None, ("query", "value")),
    (mixtral, "CAUSAL_LM", ("q_proj", "o_proj")),
    (vit, None, ("fc1",)),
)
"""How a base is made, its task, and some targets of its own; every second one below is a Llama."""


def configuration(seed: int) -> tuple[Any, LoraConfig, dict[str, Any], tuple[int, int, int]]:
    """A random small setting, and a point to ask for."""
    pick = random.Random(seed)
    make, task, names = KINDS[0] if seed % 2 else KINDS[seed // 2 % len(KINDS)]
    heads = pick.choice([2, 4, 8])
    base = make(
        pick,
        hidden_size=heads * pick.choice([16, 32]),
        intermediate_size=pick.choice([96, 256]),
        num_hidden_layers=pick.randint(5, 7),
        num_attention_heads=heads,
        vocab_size=pick.choice([320, 1000]),
    )
    config = adapter(
        task_type=task,
        target_modules=pick.choice(["all-linear", list(names)]),
        # PEFT has neither for fused experts.
        use_dora=pick.random() < 0.3 and make is not mixtral,
        lora_dropout=pick.choice([0, 0.1]) * (make is not mixtral),
    )
    setting = {
        "quantization": pick.choice([None, "nf4", "int8"]),
        "gradient_checkpointing": pick.choice([False, True, "reentrant"]),
        "padding_mask": pick.random() < 0.4,
        "outputs_held": pick.random() < 0.3,
        "accumulation": pick.choice([1, 2]),
        "optimizer": pick.choice(["adamw_torch", "adamw_torch_fused", "sgd", "adamw_8bit"]),
        "autocast": pick.random() < 0.5,
    }
    return base, config, setting, (pick.randint(1, 9), pick.randint(5, 300), pick.choice([1, 4, 24, 64]))


@pytest.mark.lora_slow
@pytest.mark.parametrize("seed", range(20))
def test_a_few_layers_stand_for_the_whole_step(seed: int) -> None:
    base, config, setting, (batch_size, seq_len, rank) = configuration(seed)
    config.r = rank
    cut = estimate_memory(config, base, batch_size=batch_size, seq_len=seq_len, **setting)
    whole = Predictor(base, config, cut.setting)
    whole._cut = Cut(0)  # layers that are cut at once
    traced = whole.estimate(batch_size, seq_len, rank)
    assert not whole._models[rank].stacks
    assert (cut.peak_allocated, cut.peak_reserved, cut.after_step) == (
        traced.peak_allocated,
        traced.peak_reserved,
        traced.after_step,
    )
    assert sum(cut.breakdown.values()) == cut.peak_allocated
    assert step_memory(config, base, **setting).peak_allocated(batch_size, seq_len) == cut.peak_allocated


@pytest.mark.lora_slow
@pytest.mark.parametrize("seed", range(20, 28))
def test_corner_points_stand_for_any_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, config, setting, point = configuration(seed)
    monkeypatch.setattr(surfaces, "FIT_AFTER", 0)
    memory = step_memory(config, base, **setting)
    memory.peak_allocated(2, 33, 8)
    interpolated = memory.estimate(*point)
    config.r = point[2]
    monkeypatch.setattr(surfaces, "FIT_AFTER", 10**6)
    traced = Predictor(base, config, interpolated.setting).estimate(*point)
    assert interpolated.peak_allocated == pytest.approx(traced.peak_allocated, rel=0.001)
    assert interpolated.peak_reserved == pytest.approx(traced.peak_reserved, rel=0.001)
    assert interpolated.after_step == pytest.approx(traced.after_step, rel=0.001)
    assert memory.peak_allocated(*point) == interpolated.peak_allocated


MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_head=4, n_layer=6),
    "bert": lambda: transformers.BertConfig(**SMALL, num_hidden_layers=6),
    "t5": lambda: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=6, num_heads=4, decoder_start_token_id=0
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, num_hidden_layers=6, num_key_value_heads=2, num_local_experts=4
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, num_hidden_layers=12, head_dim=32, num_key_value_heads=2, sliding_window=64
    ),
    "vit": lambda: transformers.ViTConfig(
        **SMALL, num_hidden_layers=6, image_size=32, architectures=["ViTForImageClassification"]
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config={"model_type": "llama", **SMALL, "num_hidden_layers": 6},
        vision_config={
            "model_type": "clip_vision_model",
            **SMALL,
            "num_hidden_layers": 6,
            "image_size": 112,
            "patch_size": 14,
        },
    ),
}
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "vit": None, "llava": None}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_every_kind_of_model(kind: str, padded: bool) -> None:
    config = adapter(task_type=TASKS.get(kind, "CAUSAL_LM"))
    estimate = estimate_memory(
        config, MODELS[kind](), batch_size=2, seq_len=96, padding_mask=padded, gradient_checkpointing=padded
    )
    assert 0 < estimate.loaded < estimate.after_step <= estimate.peak_allocated <= estimate.peak_reserved
    assert sum(estimate.breakdown.values()) == estimate.peak_allocated
    assert max(p.peak for p in estimate.timeline) == estimate.peak_allocated
    assert estimate.breakdown["adapters"] > 0


def test_a_quantized_base_with_biases_makes_the_same_storages_each_time() -> None:
    """bitsandbytes casts biases in the first forward: where the old ones were, other storages come to lie."""
    setting = StepSetting(2, 96, Quantization("nf4"), prepare_for_kbit=True, autocast="bfloat16")
    steps = [Predictor(MODELS["gpt2"](), adapter(), setting)._step((2, 96, 8)) for _ in range(3)]
    assert all((s.events, s.sizes) == (steps[0].events, steps[0].sizes) for s in steps)


def small(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, "num_hidden_layers": 8, "vocab_size": 512, **fields})


def peak(**fields: Any) -> int:
    fields = {"batch_size": 4, "seq_len": 128, **fields}
    return estimate_memory(
        adapter(r=fields.pop("r", 8)), fields.pop("base", small()), **fields
    ).peak_allocated


def test_more_of_anything_needs_more_memory() -> None:
    assert peak(batch_size=1) < peak(batch_size=2) < peak(batch_size=16)
    assert peak(seq_len=64) < peak() < peak(seq_len=1024)
    assert peak(r=1) < peak(r=8) < peak(r=64)
    assert peak(gradient_checkpointing=True) < peak()
    assert peak(optimizer="sgd", batch_size=1, seq_len=8) < peak(batch_size=1, seq_len=8)
    assert peak() < peak(padding_mask=True)


def test_paged_optimizers_keep_their_state_outside_of_the_allocator() -> None:
    wide = small(hidden_size=1024)
    inside = estimate_memory(adapter(r=128), wide, batch_size=1, seq_len=8, optimizer="adamw_8bit")
    paged = estimate_memory(adapter(r=128), wide, batch_size=1, seq_len=8, optimizer="paged_adamw_8bit")
    assert inside.paged == 0
    assert paged.paged > 0
    assert paged.after_step < inside.after_step
    half = small(hidden_size=1024, num_hidden_layers=wide.num_hidden_layers // 2)
    few = estimate_memory(adapter(r=128), half, batch_size=1, seq_len=8, optimizer="paged_adamw_8bit")
    assert paged.paged == 2 * few.paged


def test_a_live_model_is_read_and_left_alone() -> None:
    config = small(num_hidden_layers=2)
    model = transformers.LlamaForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = estimate_memory(adapter(), model, batch_size=2, seq_len=32)
    described = estimate_memory(config, adapter(), batch_size=2, seq_len=32)
    assert live.peak_allocated == pytest.approx(described.peak_allocated, rel=0.001)
    assert all((model.state_dict()[name] == tensor).all() for name, tensor in before.items())
    assert not any(p.grad is not None or p.is_meta for p in model.parameters())


def test_a_folder_with_a_configuration_is_enough(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    read = estimate_memory(adapter(), tmp_path, batch_size=2, seq_len=32)
    assert read.peak_allocated == peak(batch_size=2, seq_len=32)


def test_largest_that_fits_is_the_last_that_does() -> None:
    budget = 64 * 2**20
    for vary in ("batch_size", "seq_len", "r"):
        largest = largest_that_fits(adapter(), small(), budget, vary=vary, batch_size=2, seq_len=64)
        at = {"batch_size": 2, "seq_len": 64, "r": 8}
        assert largest > 1
        assert peak(**{**at, vary: largest}) <= budget < peak(**{**at, vary: largest + 1})
    assert largest_that_fits(adapter(), small(), "1MiB", vary="r") == 0


def test_one_adapter_at_many_points() -> None:
    memory = step_memory(adapter(r=4), small(), quantization="nf4")
    assert isinstance(memory, StepMemory)
    assert memory.rank == 4
    assert memory.peak_allocated(2, 64) == memory.peak_allocated(2, 64, 4) < memory.peak_allocated(2, 64, 32)
    assert memory.peak_reserved(2, 64) == memory.estimate(2, 64).peak_reserved
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, not 0$"):
        memory.peak_allocated(0, 64)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch_size": -1}, ValueError, "batch_size must be at least 1, not -1"),
    ({"batch_size": True}, TypeError, "batch_size must be a whole number, not True"),
    ({"seq_len": 1.5}, TypeError, "seq_len must be a whole number, not 1.5"),
    ({"optimizer": "adam"}, ValueError, "optimizer must be one of adamw_torch, adamw_torch_fused, sgd, "),
    ({"quantization": "nf8"}, ValueError, "nf4, fp4, int8, not 'nf8'; did you mean 'nf4'?"),
    (
        {"quantization": 4},
        TypeError,
        "quantization must be one of nf4, fp4, int8, a BitsAndBytesConfig or None",
    ),
    ({"quantization": BitsAndBytesConfig()}, ValueError, "this BitsAndBytesConfig loads neither in 4 nor"),
    ({"dtype": "int8"}, ValueError, "dtype must be one of bfloat16, float16, float32, not 'int8'"),
    (
        {"gradient_checkpointing": "yes"},
        ValueError,
        "gradient_checkpointing must be True, False or 'reentrant'",
    ),
    ({"padding_mask": 1}, TypeError, "padding_mask must be True or False, not 1"),
    ({"accumulation": 0}, ValueError, "accumulation must be at least 1, not 0"),
    ({"workspace": "32"}, ValueError, 'workspace must carry a unit: "32GiB" '),
    ({"autocast": "int8"}, ValueError, "autocast must be one of bfloat16, float16, float32, not 'int8'"),
    ({"trainer": "trl-sftt"}, ValueError, "did you mean 'trl-sft'?"),
    (
        {"args": {"optim": "sgd"}},
        TypeError,
        "args must be a transformers.TrainingArguments or one of SFTConfig",
    ),
    (
        {"batch_size": None},
        TypeError,
        "estimate_memory needs batch_size=, or args= of a trainer that have it",
    ),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        estimate_memory(adapter(), small(), **{"batch_size": 1, "seq_len": 8, **fields})
    assert message in str(raised.value)


def test_what_is_no_lora_or_no_base_is_named() -> None:
    with pytest.raises(TypeError, match=r"^config must be a peft\.LoraConfig, not {'r': 8}$"):
        estimate_memory({"r": 8}, small(), batch_size=1, seq_len=8)
    with pytest.raises(
        TypeError, match=r"^base must be a torch\.nn\.Module, a transformers PretrainedConfig"
    ):
        estimate_memory(adapter(), 7, batch_size=1, seq_len=8)
    with pytest.raises(
        ValueError,
        match=r"^base: no/such/config\.json does not exist; give a model folder, a config\.json, a live model, or the "
        r"name of a public model$",
    ):
        estimate_memory(adapter(), "no/such/config.json", batch_size=1, seq_len=8)
    with pytest.raises(ValueError, match=r"^config: PEFT refuses it on this base: Target modules"):
        estimate_memory(adapter(target_modules=["nope"]), small(), batch_size=1, seq_len=8)


def test_a_base_with_an_adapter_and_one_that_transformers_does_not_know_are_refused() -> None:
    adapted = get_peft_model(transformers.LlamaForCausalLM(small(num_hidden_layers=1)), adapter())
    with pytest.raises(
        ValueError, match=r"^base: this PeftModelForCausalLM carries an adapter already; give the model"
    ):
        estimate_memory(adapter(), adapted, batch_size=1, seq_len=8)
    network = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"^base: a step can be run of transformers models, not of a Sequential$"
    ):
        estimate_memory(LoraConfig(target_modules=["0"]), network, batch_size=1, seq_len=8)


class AsksForValues(transformers.LlamaForCausalLM):
    """A model that decides by the values of its input."""

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        if int(input_ids.sum()) > 0:
            return super().forward(input_ids, **rest)
        raise AssertionError


def test_what_cannot_be_traced_is_named() -> None:
    model = AsksForValues(small(num_hidden_layers=2))
    with pytest.raises(
        ValueError,
        match=r"^base: a step of AsksForValues cannot be traced: aten\._local_scalar_dense\.default",
    ):
        estimate_memory(adapter(), model, batch_size=1, seq_len=8)


def test_nothing_global_is_left_changed() -> None:
    import gc
    import logging

    from torch.nn import functional

    replaced = (
        torch.autocast,
        functional.linear,
        functional.dropout,
        functional.scaled_dot_product_attention,
    )
    asking = AsksForValues(small(num_hidden_layers=2))
    before = (
        torch.get_default_dtype(),
        gc.isenabled(),
        logging.root.manager.disable,
        torch.get_rng_state().sum(),
    )
    peak(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="cannot be traced"):
        estimate_memory(adapter(), asking, batch_size=1, seq_len=8)
    assert before == (
        torch.get_default_dtype(),
        gc.isenabled(),
        logging.root.manager.disable,
        torch.get_rng_state().sum(),
    )
    now = (torch.autocast, functional.linear, functional.dropout, functional.scaled_dot_product_attention)
    assert now == replaced
    assert "__matmul__" not in vars(torch.Tensor)


def test_initial_values_are_left_out_on_the_meta_device_alone() -> None:
    before = nn.init.constant_
    with without_initial_values():
        nothing = nn.init.constant_(torch.empty(2, device="meta"), 7.0)
        assert nothing._version == 0
        assert nn.init.constant_(torch.empty(2), 7.0).tolist() == [7.0, 7.0]
    assert nn.init.constant_ is before


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        StepSetting(1, 1).batch_size = 2


@pytest.mark.parametrize(
    ("fields", "each"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 2 * 16),
        ({"num_attention_heads": 4}, 4 * 16),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}, 2 * 32),
    ],
)
def test_generated_keys_and_values_take_two_bytes_a_number(fields: dict[str, int], each: int) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=3, **fields)
    assert _cache_of_generation(config, StepSetting(5, 7)) == 2 * 2 * 3 * each * 5 * 7
    assert _cache_of_generation(None, StepSetting(5, 7)) == 0
