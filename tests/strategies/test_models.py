"""Live models that are drawn: sound, apart from each other, and printed as code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from peft import LoraConfig
from torch import nn

from pytest_lora import check_model
from pytest_lora.bases.tiny import text_batch
from pytest_lora.strategies import build_lora_model, lora_configs, lora_models

FEW = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@FEW
@given(lora_models())
def test_drawn_models_are_sound(model: nn.Module) -> None:
    assert not [f for f in check_model(model).findings if f.severity != "info"]


def test_models_share_nothing() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    first, second = build_lora_model(config), build_lora_model(config)
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
        assert one.data_ptr() != two.data_ptr() or not one.numel(), name
    assert config.target_modules == {"q_proj"}


def test_a_trained_adapter_acts() -> None:
    batch: Any = {"input_ids": text_batch()["input_ids"][:1]}
    model = build_lora_model(LoraConfig(r=2, target_modules=["q_proj"]), trained=True).eval()
    with torch.no_grad():
        acting = model(**batch).logits
        with model.disable_adapter():
            assert not torch.equal(model(**batch).logits, acting)


def test_a_failing_model_is_printed_as_code() -> None:
    @settings(FEW, max_examples=5)
    @given(lora_models(trained=False, configs=lora_configs(targets=["q_proj"], ranks=[3], variants=[])))
    def fails(model: nn.Module) -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        fails()
    printed = " ".join("\n".join(caught.value.__notes__).split())
    assert "build_lora_model(" in printed
    assert "LoraConfig(r=3, target_modules=" in printed


def test_models_shrink_as_their_configurations_do() -> None:
    found = find(
        lora_models(configs=lora_configs(targets=["q_proj", "k_proj"], variants=[])),
        lambda model: model.peft_config["default"].r >= 2,
        settings=settings(FEW, max_examples=50, phases=[Phase.generate, Phase.shrink]),
    )
    config: Any = found.peft_config["default"]
    assert (config.r, config.target_modules) == (2, {"q_proj"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "llama"}, "base must be"),
        ({"configs": 1}, "configs must be"),
        ({"trained": 1}, "trained must"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lora_models(**arguments)
