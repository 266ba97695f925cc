"""The fields of a LoraConfig as plain values, and what they decide for a module."""

from __future__ import annotations

import enum
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_lora.facts.settings import Settings, is_named, rewriter, rewrites_base
from pytest_lora.patterns import matches


def of(**fields: Any) -> Settings:
    return Settings.of(SimpleNamespace(**{"r": 4, "lora_alpha": 8, **fields}))


NEUTRAL = {
    "r": 4, "lora_alpha": 8.0, "target_modules": None, "exclude_modules": None, "target_parameters": (),
    "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": (),
    "init_lora_weights": True, "layers_to_transform": (), "rank_pattern": (), "alpha_pattern": (), "task_type": None,
    "inference_mode": False, "trainable_token_indices": (), "ensure_weight_tying": False,
    "alora_invocation_tokens": None, "eva_config": False, "corda_config": False, "lora_ga_config": False,
    "loftq_config": False, "use_qalora": False, "lora_bias": False, "kasa_config": False,
    "layer_replication": (),
}  # fmt: skip


class Task(enum.Enum):
    CLASSES = "SEQ_CLS"


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({}, {}),
        ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
        ({"target_modules": {"v", "q"}}, {"target_modules": ("q", "v")}),
        ({"exclude_modules": ["v", "q"]}, {"exclude_modules": ("q", "v")}),
        ({"target_parameters": "q"}, {"target_parameters": ("q",)}),
        ({"modules_to_save": "abc"}, {"modules_to_save": ("a", "b", "c")}),
        ({"modules_to_save": ["norm", "head"]}, {"modules_to_save": ("head", "norm")}),
        ({"layers_to_transform": 3}, {"layers_to_transform": (3,)}),
        ({"layers_to_transform": [1, 0]}, {"layers_to_transform": (1, 0)}),
        ({"rank_pattern": {"q": 4.0}}, {"rank_pattern": (("q", 4),)}),
        ({"alpha_pattern": {"q": 4}}, {"alpha_pattern": (("q", 4.0),)}),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": (("", (1, 2)),)}),
        ({"trainable_token_indices": {"e": [1]}}, {"trainable_token_indices": (("e", (1,)),)}),
        ({"trainable_token_indices": []}, {}),
        ({"alora_invocation_tokens": [1]}, {"alora_invocation_tokens": (1,)}),
        ({"alora_invocation_tokens": []}, {"alora_invocation_tokens": ()}),
        ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"init_lora_weights": False}, {"init_lora_weights": False}),
        ({"init_lora_weights": 3}, {}),
        ({"layer_replication": [[0, 4], [2, 5]]}, {"layer_replication": ((0, 4), (2, 5))}),
        ({"task_type": Task.CLASSES}, {"task_type": "SEQ_CLS"}),
        ({"task_type": "CAUSAL_LM"}, {"task_type": "CAUSAL_LM"}),
        ({"bias": "all", "lora_dropout": 0.5}, {"bias": "all", "lora_dropout": 0.5}),
        ({"eva_config": {"a": 1}, "use_dora": 1}, {"eva_config": True, "use_dora": True}),
        ({"init_r": 12, "rank_pattern": {"q": [True]}}, {"r": 12}),
    ],
)
def test_fields_as_plain_values(fields: dict[str, Any], read: dict[str, Any]) -> None:
    assert asdict(of(**fields)) == {**NEUTRAL, **read}


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alora_invocation_tokens"])
def test_what_lora_cannot_use_is_refused_by_its_field(field: str) -> None:
    value = 3 if field == "alora_invocation_tokens" else "x"
    with pytest.raises(ValueError, match=rf"config: {field}={value!r} is nothing that LoRA can use"):
        of(**{field: value})


@pytest.mark.parametrize(
    ("fields", "module", "scaling"),
    [
        ({}, "q", 2.0),
        ({"use_rslora": True}, "q", 4.0),
        ({"r": 1}, "q", 8.0),
        ({"r": 0}, "q", None),
        ({"rank_pattern": {"q": 2}}, "a.q", 4.0),
        ({"rank_pattern": {"q": 0}}, "a.q", None),
        ({"rank_pattern": {"q": 2}, "alpha_pattern": {"a.q": 3}}, "a.q", 1.5),
        ({"rank_pattern": {"q": 2}}, "aq", 2.0),
        ({"rank_pattern": {"a.q": 2, "q": 8}}, "b.q", 1.0),
        ({"rank_pattern": {"[": 2}}, "q", 2.0),
    ],
)
def test_the_scaling_of_a_module(fields: dict[str, Any], module: str, scaling: float | None) -> None:
    settings = of(**fields)
    assert settings.scaling_of(module) == scaling
    assert settings.without_patterns().rank_of(module) == settings.r


def test_which_modules_are_meant() -> None:
    settings = of(target_modules=["q", "b.v"], exclude_modules=r".*\.1\.q", modules_to_save=["head"])
    assert [name for name in ("q", "a.q", "aq", "q.a", "b.v", "a.b.v", "v", "cb.v") if settings.targets(name)] == [
        "q", "a.q", "b.v", "a.b.v",
    ]  # fmt: skip
    names = ("a.1.q", "a.2.q", "head", "head.q", "a.head.b.q", "heads")
    assert [name for name in names if settings.excludes(name)] == [
        "a.1.q", "head", "head.q", "a.head.b.q",
    ]  # fmt: skip
    assert not of().targets("q")
    assert of(target_modules=r"a\..*").targets("a.q")
    assert not of(target_modules="q").targets("a.q")
    layers = of(layers_to_transform=[1, 2])
    numbered = ("l.1.q", "l.3.q", "l.2.3.q", "q", f"l.{'1' * 12}.2.q")
    assert [name for name in numbered if layers.skips_layer_of(name)] == [
        "l.3.q", "q",
    ]  # fmt: skip
    assert not of().skips_layer_of("l.1.q")
    assert (is_named("a.q", "q"), is_named("aq", "q"), matches("[", "q"), matches("q+", "qq")) == (
        True, False, False, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("init", "rewrites"),
    [
        ("pissa_niter_4", True),
        ("OLoRA", True),
        ("loftq", True),
        ("gaussian", False),
        (True, False),
        (False, False),
    ],
)
def test_initialisations_that_rewrite_the_base(init: object, rewrites: bool) -> None:
    assert rewrites_base(init) is rewrites


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, None),
        ({"init_lora_weights": "pissa", "kasa_config": {}}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": True, "kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"init_lora_weights": True, "kasa_config": None}, None),
    ],
)
def test_the_field_that_rewrites_the_base_is_named(fields: dict[str, Any], named: str | None) -> None:
    assert rewriter(SimpleNamespace(**fields)) == named
