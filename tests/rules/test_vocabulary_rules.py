"""A vocabulary that was extended: rows that nobody trains, and their healthy twins; both sides of a tied weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import Expect, check_config, check_model
from pytest_lora.bases.examples.models import BASES

NEWER_PEFT = pytest.mark.skipif(
    "ensure_weight_tying" not in LoraConfig.__dataclass_fields__,
    reason="this PEFT ties no copies and trains no rows of a head",
)

CODE = ["LORA248"]
NEW = 131
"""Rows of the extended vocabulary of the examples, which has 128."""


def extended(rows: int = NEW, base: str = "base", **how: Any) -> Any:
    torch.manual_seed(0)
    model = BASES[base]()
    model.resize_token_embeddings(rows, **how)
    return model


def found(model: Any, expect: Expect | None = None, **fields: Any) -> list[tuple[str, str]]:
    """Severity and module of each finding on a model with an adapter of these fields."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields})
    report = check_model(get_peft_model(model, config), expect=expect, select=CODE)
    return [(f.severity, f.where) for f in report.findings]


def test_untouched_rows_are_found_without_expect() -> None:
    assert found(extended()) == [("warning", "model.embed_tokens"), ("warning", "lm_head")]
    assert found(extended().to(torch.bfloat16)) == [("warning", "model.embed_tokens"), ("warning", "lm_head")]
    assert found(extended(base="tied_base")) == [("warning", "model.embed_tokens")]
    assert found(extended(129)) == [("warning", "model.embed_tokens"), ("warning", "lm_head")]


def test_rows_for_the_alignment_are_an_info() -> None:
    assert found(extended(130, pad_to_multiple_of=8)) == [("info", "model.embed_tokens"), ("info", "lm_head")]


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        pytest.param(
            {"trainable_token_indices": {"embed_tokens": [128, 129, 130], "lm_head": [128, 129, 130]}},
            marks=NEWER_PEFT,
        ),
    ],
)
def test_rows_that_an_adapter_trains(fields: dict[str, Any]) -> None:
    assert found(extended(), **fields) == []


def test_one_side_alone_leaves_the_other() -> None:
    assert found(extended(), modules_to_save=["embed_tokens"]) == [("warning", "lm_head")]
    rows = {"trainable_token_indices": {"embed_tokens": [128, 129]}}
    assert found(extended(base="tied_base"), **rows) == [("warning", "model.embed_tokens")]
    assert found(extended(base="tied_base"), trainable_token_indices=[128, 129, 130]) == []


def trained(model: Any) -> None:
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        side.weight.data[128:] += 0.002 * torch.randn_like(side.weight[128:])


def copied(model: Any) -> None:
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        side.weight.data[128:] = side.weight.data[5:8]


def zeros_of_a_checkpoint(model: Any) -> None:
    """Rows of padding in a public checkpoint: equal to each other, not to the mean."""
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        side.weight.data += 0.01
        side.weight.data[128:] = 0


@pytest.mark.parametrize("change", [trained, copied, zeros_of_a_checkpoint])
def test_rows_with_values_of_their_own(change: Any) -> None:
    model = extended()
    change(model)
    assert found(model) == []


def test_what_is_meant_counts() -> None:
    model = extended()
    assert found(copy.deepcopy(model), Expect(purpose="inference")) == []
    assert found(copy.deepcopy(model), Expect(new_tokens=3)) == []  # LORA119 judges
    padding = extended(129)
    padding.config.pad_token_id = 128
    assert found(padding) == []
    more = extended()
    more.config.pad_token_id = 128
    assert [severity for severity, _ in found(more)] == ["warning", "warning"]
    assert found(BASES["base"]()) == []
    assert found(extended(mean_resizing=False)) == []


def test_the_rest_of_a_large_vocabulary_is_read_only_if_the_last_row_is_suspicious(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pytest_lora.inspection import base_values

    monkeypatch.setattr(base_values, "_mean", lambda rows: pytest.fail("every row was read"))
    torch.manual_seed(0)
    assert base_values._rows_at_the_mean(nn.Embedding(9_000, 8).weight.detach() * 0.02) == 0
    monkeypatch.undo()
    monkeypatch.setattr(base_values, "CHUNK", 100)
    table = torch.randn(9_000, 8)
    table[8_750:] = table[:8_750].mean(0)
    assert base_values._rows_at_the_mean(table) == 250


class Sharded(torch.Tensor):
    """A tensor of another kind, whose rows are not simply there."""


def test_tensors_of_another_kind_are_left_alone() -> None:
    from pytest_lora.inspection import base_values

    plain = nn.Linear(4, 8, bias=False)
    assert base_values.readable_weight(plain) is not None
    sharded = nn.Module()
    sharded.weight = plain.weight.detach().as_subclass(Sharded)
    assert base_values.readable_weight(sharded) is None


def test_both_sides_of_a_tied_weight_are_an_info() -> None:
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    config = LoraConfig(target_modules=["q_proj"], **both)
    base = BASES["tied_base"]()
    (said,) = check_config(config, base, select=["LORA137"]).findings
    assert (said.severity, said.where) == ("info", "model.embed_tokens, lm_head")
    assert "8,192 numbers 2 times" in said.observed
    assert not check_config(config, BASES["base"](), select=["LORA137"]).findings
    model = get_peft_model(base, config)
    copies = [p for n, p in model.named_parameters(remove_duplicate=False) if "modules_to_save" in n]
    assert len({id(p) for p in copies}) == 2
    assert len(check_model(model, select=["LORA137"]).findings) == 1
    merged: Any = model.merge_and_unload()
    assert merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight


@NEWER_PEFT
def test_one_copy_for_both_sides_is_not_mentioned() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    assert not check_config(config, BASES["tied_base"](), select=["LORA137"]).findings
