"""A trace of a few layers gives every figure that the trace of all layers gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers
from peft import LoraConfig
from torch import nn

from pytest_lora import MemoryEstimate
from pytest_lora.inspection.memory.layer_stacks import Cut, _longest_run, cut_stacks
from pytest_lora.inspection.memory.predictor import Predictor
from pytest_lora.memory.setting import checked_setting

LAYERS = 8


def base(**fields: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        vocab_size=320,
        **{"num_hidden_layers": LAYERS, **fields},
    )


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({}, id="plain", marks=pytest.mark.lora_slow),
        pytest.param(
            {
                "gradient_checkpointing": True,
                "accumulation": 2,
                "optimizer": "paged_adamw_8bit",
                "quantization": "nf4",
            },
            id="checkpointing",
        ),
        pytest.param(
            {"gradient_checkpointing": "reentrant", "optimizer": "adamw_torch_fused", "outputs_held": True},
            id="reentrant",
            marks=pytest.mark.lora_slow,
        ),
        pytest.param(
            {"padding_mask": True, "autocast": True, "optimizer": "adamw_8bit", "empty_cache": True},
            id="padded",
            marks=pytest.mark.lora_slow,
        ),
    ],
)
def test_what_is_cut_is_played_as_often_as_it_is_there(setting: dict[str, Any]) -> None:
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    asked = replace(checked_setting(**setting), batch_size=3, seq_len=48)
    few, every = (Predictor(base(), config, asked) for _ in range(2))
    every._cut = Cut(0)
    cut, whole = few.estimate(3, 48, 8), every.estimate(3, 48, 8)
    (stack,) = few._models[8].stacks
    # Without checkpointing three layers do not repeat, and five are traced.
    assert stack.copies == (LAYERS - 1 if asked.gradient_checkpointing else LAYERS - 3)
    assert every._models[8].stacks == []
    assert replace(cut, timeline=()) == replace(whole, timeline=())
    assert highest(cut) == highest(whole)
    assert sum(cut.breakdown.values()) == cut.peak_allocated
    assert {one.layer for one in cut.timeline} == {None, *range(LAYERS)}
    shape, step = few._traced[3, 48, 8]
    assert step.whole_length() == len(shape.line.index) == len(every._traced[3, 48, 8][1].events)


def highest(estimate: MemoryEstimate) -> dict[str, int]:
    """The peak of each phase of the second step."""
    found: dict[str, int] = {}
    for one in estimate.timeline:
        found[one.phase] = max(one.peak, found.get(one.phase, 0))
    return found


@pytest.mark.parametrize(
    ("kinds", "together", "run"),
    [
        ("aaaaaa", 1, (0, 1, 6)),
        ("aaaaa", 1, (0, 1, 1)),
        ("baaaaaac", 1, (1, 1, 6)),
        ("abababababab", 1, (0, 2, 6)),
        ("ababababab", 1, (0, 1, 1)),
        ("aaaaaaa", 2, (0, 1, 1)),
        ("aaaaaaaaaaaaa", 2, (0, 2, 6)),
        ("abcdefgh" * 6, 1, (0, 8, 6)),
        ("abcdefghi" * 6, 1, (0, 1, 1)),
        ("aaaaaa" + "ab" * 7, 1, (6, 2, 7)),
        ("aaaaaaabbbbbbbb", 1, (7, 1, 8)),
    ],
)
def test_the_longest_run_leaves_the_fewest_layers(
    kinds: str, together: int, run: tuple[int, int, int]
) -> None:
    assert _longest_run(list(kinds), together) == run


def test_layers_that_stay_keep_their_names() -> None:
    model = nn.Sequential(
        nn.ModuleList(nn.Linear(4, 4) for _ in range(9)), nn.ModuleList(nn.ReLU() for _ in range(5))
    )
    names = {name for name, _ in model.named_modules()}
    (stack,) = cut_stacks(model)
    assert names - {name for name, _ in model.named_modules()} == {"0.3", "0.4", "0.5", "0.6"}
    assert (stack.copies, stack.number, len(stack.units)) == (6, 0, 5)
    assert stack.units[3] == (model.get_submodule("0.7"),)


def test_layers_that_differ_in_more_than_their_number_are_not_cut() -> None:
    class Numbered(nn.Module):
        def __init__(self, number: int, width: int = 4, flag: bool = False) -> None:
            super().__init__()
            self.layer_idx, self.flag = number, flag
            self.linear = nn.Linear(width, width)
            self.register_buffer("table", nn.Parameter(self.linear.weight.detach().clone()).data)

    def copies(layers: list[nn.Module]) -> list[int]:
        return [stack.copies for stack in cut_stacks(nn.Sequential(nn.ModuleList(layers)))]

    alike: list[nn.Module] = [Numbered(i) for i in range(7)]
    assert copies(list(alike)) == [4]
    assert copies([*alike[:3], Numbered(3, width=5), *alike[4:]]) == []
    assert copies([*alike[:3], Numbered(3, flag=True), *alike[4:]]) == []
