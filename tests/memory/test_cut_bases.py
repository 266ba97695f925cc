"""A base that is built once and copied for every adapter of a search gives the steps that one built anew gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import BertConfig, GPT2Config, LlamaConfig

from pytest_lora.inspection.memory import meta_model
from pytest_lora.inspection.memory.cut_bases import CutBase, KeptBases, cut_base, kept_for
from pytest_lora.inspection.memory.layer_stacks import USUAL, Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.inspection.memory.step import assemble
from pytest_lora.memory import kept as predictors
from pytest_lora.memory.setting import checked_setting
from pytest_lora.strategies import lora_configs

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=8, vocab_size=128
)
OTHERS = {
    "gpt2": GPT2Config(n_layer=7, n_embd=64, n_head=4, vocab_size=128),
    "bert": BertConfig(
        hidden_size=64, num_hidden_layers=7, num_attention_heads=4, intermediate_size=96, vocab_size=128
    ),
}
SETTINGS: list[dict[str, Any]] = [
    {"gradient_checkpointing": True, "quantization": "nf4"},
    {"gradient_checkpointing": "reentrant", "quantization": "int8"},
    {"optimizer": "adamw_8bit", "dtype": "float16"},
    {"trainer": "transformers", "frozen": ["lora_A"], "autocast": True, "gradient_checkpointing": True},
]


def step_of(base: Any, config: LoraConfig, setting: dict[str, Any], kept: KeptBases | None) -> Any:
    asked = replace(checked_setting(**setting), batch_size=3, seq_len=24)
    built = build(base, config, asked, cut=Cut(before=1, after=0), kept=kept)
    return assemble(built, asked), [name for name, p in built.model.named_parameters() if p.requires_grad]


KEPT = KeptBases()


@pytest.mark.lora_slow
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(lora_configs(LLAMA, ranks=[4, 8]), st.sampled_from(SETTINGS))
def test_a_copy_makes_the_storages_of_a_new_one(config: LoraConfig, setting: dict[str, Any]) -> None:
    new = step_of(LLAMA, config, setting, None)
    for _ in range(2):
        assert step_of(LLAMA, config, setting, KEPT) == new


@pytest.mark.parametrize("name", OTHERS)
def test_other_bases_are_copied_too(name: str) -> None:
    kept, base = KeptBases(), OTHERS[name]
    for targets in (["query"], ["dense"], ["query", "value"]) if name == "bert" else (["c_attn"], ["c_fc"]):
        config = LoraConfig(r=4, target_modules=targets, bias="all", fan_in_fan_out=name == "gpt2")
        for _ in range(3):
            made = step_of(base, config, SETTINGS[0], kept)
        assert made == step_of(base, config, SETTINGS[0], None)


def asked(kept: KeptBases, cut: Cut = USUAL, setting: dict[str, Any] | None = None, **fields: Any) -> Any:
    config = LoraConfig(**{"target_modules": ["q_proj"], **fields})
    return cut_base(LLAMA, config, checked_setting(**setting or {}), cut, kept)


def test_what_is_given_is_the_callers_own() -> None:
    """A base whose biases one adapter trains is frozen for the next."""
    kept = KeptBases()
    given = [asked(kept) for _ in range(4)]
    assert [*map(id, given)] == list(dict.fromkeys(map(id, given)))
    tensors = [{id(p) for p in one.model.parameters()} for one in given]
    assert len(set.union(*tensors)) == sum(map(len, tensors))
    modules = [{id(m) for m in one.model.modules()} for one in given]
    assert len(set.union(*modules)) == sum(map(len, modules))
    for one in given:
        (stack,) = one.stacks
        layers = {id(layer) for layer in one.model.model.layers}
        assert {id(layer) for unit in stack.units for layer in unit} == layers
        one.model.requires_grad_(False)
    assert not any(p.requires_grad for p in given[0].model.parameters())
    assert all(p.requires_grad for p in asked(kept).model.parameters())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"layers_to_transform": [5]}),
        ({}, {"cut": Cut(before=1, after=0)}),
        ({}, {"setting": {"dtype": "float16"}}),
        ({"task_type": "SEQ_CLS"}, {"task_type": "CAUSAL_LM"}),
        ({"task_type": "SEQ_CLS"}, {"task_type": "SEQ_CLS", "setting": {"trainer": "trl-reward"}}),
    ],
)
def test_what_is_another_base_is_not_answered_by_the_first(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    kept = KeptBases()
    for _ in range(3):
        asked(kept, **one)
    expected = asked(KeptBases(), **other)
    for _ in range(3):
        found = asked(kept, **other)
        assert describe(found) == describe(expected)


def describe(cut: Any) -> Any:
    shapes = [(name, p.shape, p.dtype) for name, p in cut.model.named_parameters()]
    return type(cut.model), shapes, [(stack.copies, stack.number) for stack in cut.stacks], cut.runs


def test_bases_are_told_apart_by_what_is_asked() -> None:
    assert kept_for(("one",)) is kept_for(("one",))
    assert kept_for(("one",)) is not kept_for(("other",))


def test_no_more_are_kept_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_lora.inspection.memory.cut_bases._MOST", 2)
    kept = KeptBases()
    for layer in (1, 2, 3):
        for _ in range(2):
            asked(kept, layers_to_transform=[layer])
    assert len(kept._asked) <= 2
    assert torch.get_default_dtype() == torch.float32


def test_copies_are_given_from_the_second_time_on_and_on_one_gpu_alone() -> None:
    kept = KeptBases()
    for _ in range(2):
        asked(kept, setting={"gpus": 2})
    assert not kept._asked
    asked(kept)
    assert list(kept._asked.values()) == [None]
    asked(kept)
    assert None not in kept._asked.values()


def test_rewards_alone_are_learned_with_a_score() -> None:
    assert type(asked(KeptBases()).model).__name__ == "LlamaForCausalLM"
    for task in (None, "CAUSAL_LM"):
        scoring = asked(KeptBases(), setting={"trainer": "trl-reward"}, task_type=task).model
        assert type(scoring).__name__ == "LlamaForSequenceClassification"
        assert scoring.score.out_features == 1


@pytest.mark.parametrize(("given", "found"), [(None, 0), (3, 3)])
def test_a_padding_token_is_set_where_there_is_none(given: int | None, found: int) -> None:
    base = LlamaConfig(**{**LLAMA.to_dict(), "pad_token_id": given})
    cut = cut_base(base, LoraConfig(target_modules=["q_proj"]), checked_setting(), USUAL)
    config: Any = cut.model.config
    assert config.pad_token_id == found
    assert not hasattr(config, "image_token_id")


def test_no_more_predictors_are_kept_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    settings = [checked_setting(optimizer=name) for name in ("adamw_torch", "sgd", "adagrad")]
    monkeypatch.setattr(predictors, "_predictors", {})
    monkeypatch.setattr(predictors, "_KEPT", 2)
    first, second = (predictors.predictor_for(LLAMA, config, setting) for setting in settings[:2])
    assert predictors.predictor_for(LLAMA, config, settings[0]) is first
    predictors.predictor_for(LLAMA, config, settings[2])
    assert next(iter(predictors._predictors.values())) is second, "the oldest is forgotten"
    assert predictors.predictor_for(LLAMA, config, settings[1]) is second
    predictors.forget()
    assert predictors.predictor_for(LLAMA, config, settings[1]) is not second
    live = cut_base(LLAMA, config, settings[0], USUAL).model
    assert predictors.predictor_for(live, config, settings[0]) is not predictors.predictor_for(
        live, config, settings[0]
    )
    assert len(predictors._predictors) == 1


def test_what_peft_puts_off_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_model, "_sampler", lambda layer, adapter, config: (adapter, config))
    layer: Any = torch.nn.Linear(2, 2)
    layer._lora_kasa_truncation_deferred = {"one"}
    layer._lora_monteclora_config = {"one": 1, "two": 2}
    layer.lora_monteclora_sampler = {"one": "made before"}
    meta_model.finish(torch.nn.Sequential(layer, torch.nn.Linear(2, 2)))
    assert layer.lora_monteclora_sampler == {"one": "made before", "two": ("two", 2)}
    assert layer._lora_kasa_truncation_deferred == set()


@pytest.mark.parametrize(("others", "built_again"), [(14, 1), (15, 2)])
def test_sixteen_bases_are_kept_and_then_all_are_forgotten(others: int, built_again: int) -> None:
    """What is asked for the second time is kept, so that one that is forgotten is built twice more."""
    built: list[int] = []

    def make() -> CutBase:
        built.append(1)
        return CutBase(torch.nn.Module(), [], [], [], ())

    kept = KeptBases()
    for key in range(1 + others):
        kept.base(key, lambda layers, modules: (), make)
    built.clear()
    for _ in range(3):
        kept.base(0, lambda layers, modules: (), make)
    assert len(built) == built_again
