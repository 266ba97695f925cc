"""Configurations that are drawn are sound, and those drawn with a fault have it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from pytest_lora import Report, check_config, check_model
from pytest_lora.strategies import (
    TrainingShape,
    lora_configs,
    misconfigured_lora_configs,
    training_shapes,
)
from pytest_lora.strategies.models import register_profiles
from tests.test_random_configs import MODELS

NAMES = ("base", "base_4bit", "gpt2_base", "classifier_base", "moe_base", "bert")
"""Llama, the same in 4 bits, GPT-2 with its Conv1D, a classifier, a mixture of experts, BERT."""

MORE = ("tied_base", "vision_language_base", "batchnorm_base", "convolutions", "fused_moe_base", "t5")


@cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def draws(number: int) -> settings:
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def loud(report: Report) -> list[str]:
    return [str(f) for f in report.findings if f.severity != "info"]


def all_sound(name: str, number: int) -> None:
    base = model(name)

    @draws(number)
    @given(lora_configs(base))
    def sound(config: LoraConfig) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not loud(check_config(config, base))
            adapted = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
            assert not loud(check_model(adapted))

    sound()


def all_faulty(name: str, number: int) -> set[str]:
    base = model(name)
    seen: set[str] = set()

    @draws(number)
    @given(misconfigured_lora_configs(base))
    def faulty(drawn: tuple[LoraConfig, str]) -> None:
        config, code = drawn
        seen.add(code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = check_config(config, base)
        assert code in {f.code for f in report.findings}, report

    faulty()
    return seen


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_drawn_configurations_are_sound(name: str) -> None:
    all_sound(name, 8)


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_drawn_faults_are_found(name: str) -> None:
    assert len(all_faulty(name, 15)) > 4


def test_everything_is_drawn() -> None:
    """Every field varies, on a base that has space for it."""
    seen: set[str] = set()
    forms: set[str] = set()

    @draws(300)
    @given(lora_configs(model("gpt2_base")))
    def collect_gpt2(config: LoraConfig) -> None:
        seen.update(written(config))

    @draws(300)
    @given(lora_configs(model("base")))
    def collect(config: LoraConfig) -> None:
        seen.update(written(config))
        forms.add(
            config.target_modules
            if config.target_modules == "all-linear"
            else type(config.target_modules).__name__
        )

    collect_gpt2()
    collect()
    assert forms == {"all-linear", "set", "str"}
    assert seen >= {
        *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform"),
        *("lora_dropout", "bias", "use_rslora", "use_dora", "init_lora_weights", "modules_to_save"),
    }


def test_what_is_asked_for_is_drawn() -> None:
    @draws(50)
    @given(lora_configs(LlamaConfig(), ranks=[16, 4], targets=["v_proj", "q_proj"], variants=["dora"]))
    def narrow(config: LoraConfig) -> None:
        assert config.r in (4, 16)
        named = re.findall(r"\w_proj", str(config.target_modules))
        assert set(named) <= {"q_proj", "v_proj"}
        assert config.init_lora_weights is True
        assert not config.use_rslora

    narrow()
    quantized = lora_configs(model("base_4bit"), targets="all-linear")
    assert find(quantized, lambda config: True).target_modules == "all-linear"


def test_quantized_weights_get_no_initialisation_that_changes_them() -> None:
    @draws(150)
    @given(lora_configs(model("base_4bit"), targets=["q_proj", "down_proj"]))
    def suits(config: LoraConfig) -> None:
        assert config.init_lora_weights in (True, "gaussian")

    suits()


# ------------------------------------------------------------------ shrinking


def written(config: LoraConfig) -> dict[str, Any]:
    """Fields that are not at their defaults, the rank always."""
    plain = vars(LoraConfig())
    fields = {k: v for k, v in vars(config).items() if v != plain[k] and k != "runtime_config"}
    if isinstance(config.target_modules, set):
        fields["target_modules"] = sorted(config.target_modules)
    return {"r": config.r, **fields}


def targets_k(config: LoraConfig) -> bool:
    return "k_proj" in str(config.target_modules)


PLANTED: dict[str, tuple[Callable[[LoraConfig, TrainingShape], bool], dict[str, Any], TrainingShape]] = {
    "anything": (lambda c, s: True, {}, TrainingShape()),
    "r >= 24 together with k_proj": (
        lambda c, s: c.r >= 24 and targets_k(c),
        {"r": 24, "target_modules": ["k_proj"]},
        TrainingShape(),
    ),
    "seq x batch > 4096 without checkpointing": (
        lambda c, s: s.batch_size * s.seq_len > 4096 and not s.gradient_checkpointing,
        {},
        TrainingShape(1, 4097),
    ),
    "batch above 8": (lambda c, s: s.batch_size > 8, {}, TrainingShape(9, 1)),
    "DoRA in 4 bits": (
        lambda c, s: c.use_dora and s.quantization == "nf4",
        {"use_dora": True},
        TrainingShape(quantization="nf4"),
    ),
    "rsLoRA with r > 64": (
        lambda c, s: c.use_rslora and c.r > 64,
        {"r": 65, "use_rslora": True},
        TrainingShape(),
    ),
    "three targets": (
        lambda c, s: isinstance(c.target_modules, set) and len(c.target_modules) >= 3,
        {"target_modules": ["k_proj", "q_proj", "v_proj"]},
        TrainingShape(),
    ),
    "dropout": (lambda c, s: c.lora_dropout > 0, {"lora_dropout": 0.05}, TrainingShape()),
    "block 7": (
        lambda c, s: 7 in (c.layers_to_transform or ()),
        {"layers_to_transform": [7]},
        TrainingShape(),
    ),
    "two blocks": (
        lambda c, s: len(c.layers_to_transform or ()) == 2,
        {"layers_to_transform": [0, 1]},
        TrainingShape(),
    ),
    "a rank of its own": (
        lambda c, s: bool(c.rank_pattern),
        {"rank_pattern": {"q_proj": 2}},
        TrainingShape(),
    ),
    "PiSSA at r >= 10": (
        lambda c, s: c.init_lora_weights == "pissa" and c.r >= 10,
        {"r": 10, "init_lora_weights": "pissa"},
        TrainingShape(),
    ),
    "a saved head under SGD": (
        lambda c, s: "lm_head" in (c.modules_to_save or ()) and s.optimizer == "sgd",
        {"modules_to_save": ["lm_head"]},
        TrainingShape(optimizer="sgd"),
    ),
    "all-linear": (
        lambda c, s: c.target_modules == "all-linear",
        {"target_modules": "all-linear", "layers_to_transform": None},
        TrainingShape(),
    ),
}
SIMPLEST = {"r": 1, "target_modules": ["q_proj"], "layers_to_transform": [0]}


@pytest.mark.lora_slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_shrink_to_the_exact_example(name: str) -> None:
    fails, expected, shape = PLANTED[name]
    config, found = find(
        st.tuples(lora_configs(LLAMA), training_shapes()),
        lambda drawn: fails(*drawn),
        settings=settings(draws(5000), phases=[Phase.generate, Phase.shrink]),
    )
    whole = {k: v for k, v in {**SIMPLEST, **expected}.items() if v is not None}
    assert written(config) == whole
    assert found == shape


LLAMA = LlamaConfig()


def test_a_failing_example_is_printed_as_code() -> None:
    # Where CI is set, Hypothesis would add how to reproduce the failure by a decorator, beside the call.
    @settings(draws(500), phases=[Phase.generate, Phase.shrink], print_blob=False)
    @given(config=lora_configs(LLAMA), shape=training_shapes(), wrong=misconfigured_lora_configs(LLAMA))
    def fails(config: LoraConfig, shape: TrainingShape, wrong: tuple[LoraConfig, str]) -> None:
        assert not (targets_k(config) and shape.gradient_checkpointing)

    with pytest.raises(AssertionError) as caught:
        fails()
    printed = "\n".join(caught.value.__notes__)
    call = printed[printed.index("fails(") :]
    pasted = eval(call, {"fails": dict, "LoraConfig": LoraConfig, "TrainingShape": TrainingShape})
    assert written(pasted["config"]) == {**SIMPLEST, "target_modules": ["k_proj"]}
    assert pasted["shape"] == TrainingShape(gradient_checkpointing=True)
    config, code = pasted["wrong"]
    assert code in {f.code for f in check_config(config, LLAMA).findings}


# ------------------------------------------------------------------ profiles and arguments


def test_profiles_are_there_and_none_is_chosen() -> None:
    before = settings.default
    register_profiles()
    assert settings.default is before
    assert [settings.get_profile(name).deadline for name in ("lora-ci", "lora-dev")] == [None, None]
    assert settings.get_profile("lora-ci").derandomize


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranks": 8}, TypeError, "ranks must be whole numbers"),
        ({"ranks": []}, ValueError, "ranks must not be empty"),
        ({"ranks": [0]}, ValueError, "ranks must be at least 1"),
        ({"ranks": [2.5]}, TypeError, "one is 2.5"),
        ({"ranks": ["a", 1]}, TypeError, "one is 'a'"),
        ({"ranks": [64]}, ValueError, "the smallest, 64, is too large for every target"),
        ({"targets": "q_proj"}, TypeError, "a list of names"),
        ({"targets": []}, ValueError, "targets must not be empty"),
        ({"targets": [1]}, TypeError, "one is 1"),
        ({"targets": ["c_attn"]}, ValueError, r"\['c_attn'\] are not among the names of this base: q_proj"),
        ({"variants": "dora"}, TypeError, "variants must be a list"),
        ({"variants": ["vera"]}, ValueError, "'vera' is none of rslora, dora"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_configs(model("base_4bit"), **arguments)


def test_bad_bases_are_named() -> None:
    with pytest.raises(TypeError, match="base must be"):
        lora_configs(3)
    with pytest.raises(ValueError, match="carries an adapter"):
        lora_configs(get_peft_model(copy.deepcopy(model("base")), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="no module that LoRA could adapt"):
        misconfigured_lora_configs(nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 1"),
        ({"max_seq_len": 2.0}, TypeError, "max_seq_len must be a whole number"),
        ({"quantizations": "nf4"}, TypeError, "quantizations must be a list"),
        ({"optimizers": ["adam"]}, ValueError, "optimizers: 'adam' is none of"),
        ({"gradient_checkpointing": []}, ValueError, "gradient_checkpointing must not be empty"),
    ],
)
def test_bad_shapes_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        training_shapes(**arguments)
