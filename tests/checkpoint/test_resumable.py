"""``assert_resumable``: what it refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from torch import nn

from pytest_lora import LoraHealthError, assert_resumable
from pytest_lora.bases.examples import folders
from tests.namespace import Namespace

SAVED: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{**SAVED, **changes})


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.1}, {"target_modules": r".*\.(q|v)_proj"}])
@pytest.mark.parametrize("with_base", [False, True])
def test_the_configuration_of_the_checkpoint_goes_on(
    names: Namespace, base: nn.Module, changes: dict[str, Any], with_base: bool
) -> None:
    assert assert_resumable(names.adapter(), config(**changes), base if with_base else None).ok


@pytest.mark.parametrize(
    ("changes", "code", "observed"),
    [
        (
            {"r": 16},
            "LORA920",
            "the configuration has r=16, the checkpoint rank 8 in 4 modules: model.layers.*.self_attn.q_proj, "
            "model.layers.*.self_attn.v_proj; LoRA shapes are fixed at initialisation",
        ),
        (
            {"target_modules": ["q_proj", "k_proj", "v_proj"]},
            "LORA921",
            "the checkpoint has no tensors for k_proj; LoRA shapes are fixed at initialisation",
        ),
        (
            {"target_modules": ["q_proj"]},
            "LORA921",
            "the configuration does not adapt 2 modules: model.layers.*.self_attn.v_proj of the checkpoint; "
            "LoRA shapes are fixed at initialisation",
        ),
        (
            {"lora_alpha": 32},
            "LORA922",
            "the configuration has lora_alpha=32, the checkpoint 16, as for model.layers.0.self_attn.q_proj: what was "
            "learned would be scaled by another factor",
        ),
        (
            {"base_model_name_or_path": "org/other"},
            "LORA923",
            "the configuration is for the base 'org/other', the checkpoint was trained on 'org/tiny-llama'",
        ),
        (
            {"use_rslora": True},
            "LORA924",
            "use_rslora is True in the configuration and False in the checkpoint",
        ),
        (
            {"lora_bias": True},
            "LORA924",
            "lora_bias is True in the configuration and False in the checkpoint",
        ),
        (
            {"exclude_modules": ["v_proj"]},
            "LORA921",
            "the configuration does not adapt 2 modules: model.layers.*.self_attn.v_proj of the checkpoint; "
            "LoRA shapes are fixed at initialisation",
        ),
        (
            {"exclude_modules": ["o_proj"]},
            "LORA924",
            "exclude_modules is ['o_proj'] in the configuration and None in the checkpoint",
        ),
    ],
)
def test_another_configuration_is_refused(
    names: Namespace, changes: dict[str, Any], code: str, observed: str
) -> None:
    with pytest.raises(LoraHealthError) as caught:
        assert_resumable(names.adapter(), config(**changes))
    (finding,) = caught.value.report.findings
    assert (finding.code, finding.observed) == (code, observed)
    assert finding.fix.endswith("start fresh with this configuration, or go on with that of the checkpoint")


def test_a_base_says_what_an_exclusion_excludes(names: Namespace, base: nn.Module) -> None:
    assert assert_resumable(names.adapter(), config(exclude_modules=["o_proj"]), base).ok
    excluded = names.adapter(exclude_modules=["v_proj"])
    assert assert_resumable(excluded, config(exclude_modules=["v_proj"]), base).ok
    with pytest.raises(LoraHealthError, match="LORA921"):
        assert_resumable(excluded, config(), base)
    with pytest.raises(LoraHealthError, match="LORA924"):
        assert_resumable(excluded, config())


def test_a_base_says_what_all_linear_is(names: Namespace, base: nn.Module) -> None:
    path = names.adapter()
    everything = config(target_modules="all-linear")
    assert assert_resumable(path, everything).ok
    with pytest.raises(LoraHealthError, match="LORA921"):
        assert_resumable(path, everything, base)


def test_a_rank_pattern_counts(names: Namespace) -> None:
    path = names.adapter(rank_pattern={"v_proj": 4})
    assert assert_resumable(path, config(rank_pattern={"v_proj": 4})).ok
    with pytest.raises(LoraHealthError, match="r=8, the checkpoint rank 4 in 2 modules"):
        assert_resumable(path, config())


def test_a_damaged_checkpoint_is_no_checkpoint(names: Namespace) -> None:
    path = folders.cut(names.adapter(), "adapter_model.safetensors", by=10)
    with pytest.raises(LoraHealthError, match=r"LORA925.*\n.*\n.*adapter_model.safetensors: it is cut off"):
        assert_resumable(path, config())


def test_arguments_are_named(names: Namespace) -> None:
    no_config: Any = {}
    no_path: Any = 3
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, not {}"):
        assert_resumable(names.adapter(), no_config)
    with pytest.raises(TypeError, match="path must be a path, not 3"):
        assert_resumable(no_path, config())
    with pytest.raises(ValueError, match="path: '/no/where' does not exist; adapters are never downloaded"):
        assert_resumable("/no/where", config())
