"""The arguments of all questions about memory: named, in either order, in the usual spellings, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import estimate_memory, largest_that_fits, oom_frontier, step_memory
from pytest_lora.memory import StepArguments
from pytest_lora.memory.setting import checked_setting

BASE: Any = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=6, vocab_size=256
)
CONFIG: Any = LoraConfig(r=4, target_modules=["q_proj"])
FUNCTIONS: tuple[Callable[..., Any], ...] = (estimate_memory, step_memory, largest_that_fits, oom_frontier)
OWN: dict[str, dict[str, Any]] = {
    "estimate_memory": {"batch_size": 1, "seq_len": 8},
    "largest_that_fits": {"budget": "1GiB", "vary": "batch_size"},
    "oom_frontier": {"budget": "1GiB"},
}


def test_every_setting_is_declared() -> None:
    assert set(StepArguments.__annotations__) == set(inspect.signature(checked_setting).parameters)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_signature_names_every_setting(function: Callable[..., Any]) -> None:
    shown = inspect.signature(function).parameters
    assert list(shown)[:2] == ["config", "base"]
    assert set(StepArguments.__annotations__) < set(shown)
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_an_unknown_argument_is_refused_by_the_function_that_was_called(
    function: Callable[..., Any],
) -> None:
    own = OWN.get(function.__name__, {})
    for wrong, written in (
        ("quantisation", "quantization="),
        ("gradient_accumulation_steps", "accumulation="),
        ("load_in_4bit", 'quantization="nf4"'),
    ):
        with pytest.raises(
            TypeError, match=f"^{function.__name__} has no argument '{wrong}'; write {written}$"
        ):
            function(CONFIG, BASE, **own, **{wrong: 1})
    with pytest.raises(TypeError, match=f"^{function.__name__} has no argument 'zzz'; it has config, base, "):
        function(CONFIG, BASE, **own, zzz=1)


def test_adapter_and_base_are_understood_in_either_order() -> None:
    peak = step_memory(CONFIG, BASE).peak_allocated(2, 16)
    assert step_memory(BASE, CONFIG).peak_allocated(2, 16) == peak
    assert step_memory(base=BASE, config=CONFIG).peak_allocated(2, 16) == peak


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"dtype": "bf16"}, {"dtype": "bfloat16"}),
        ({"dtype": torch.float16}, {"dtype": "float16"}),
        ({"dtype": "torch.float32"}, {"dtype": "float32"}),
        ({"adapter_dtype": "bf16"}, {"adapter_dtype": "bfloat16"}),
        ({"quantization": "4bit"}, {"quantization": "nf4"}),
        ({"quantization": "8bit"}, {"quantization": "int8"}),
    ],
)
def test_usual_spellings_are_taken(written: Any, meant: Any) -> None:
    assert checked_setting(**written) == checked_setting(**meant)


@pytest.mark.parametrize(("name", "example"), [("frozen", "lora_A"), ("upcast", "norm")])
@pytest.mark.parametrize("wrong", ["norm", [1], [""]])
def test_names_are_a_list(name: str, example: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf'^{name} must be a list of names such as \["{example}"\], not '):
        checked_setting(**{name: wrong})
