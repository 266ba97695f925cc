"""How far a budget goes, as a table; and a search without advice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import (
    LoraHealthError,
    OomFrontier,
    assert_fits_memory,
    check_memory,
    estimate_memory,
    largest_that_fits,
    oom_frontier,
)
from pytest_lora.strategies import TrainingShape, lora_configs, training_shapes

BASE = LlamaConfig(num_hidden_layers=4, hidden_size=512, intermediate_size=1024, num_attention_heads=8)
CONFIG = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def table() -> OomFrontier:
    return oom_frontier(CONFIG, BASE, "2GiB", seq_lens=[256, 1024, 2**20], ranks=[8, 64])


def test_each_batch_is_the_largest_that_fits(table: OomFrontier) -> None:
    assert [(row.seq_len, row.rank) for row in table.rows] == [
        (length, rank) for length in (256, 1024, 2**20) for rank in (8, 64)
    ]
    for row in table.rows[:4]:
        found = largest_that_fits(
            LoraConfig(r=row.rank, target_modules=["q_proj", "v_proj"]),
            BASE,
            "2GiB",
            vary="batch_size",
            seq_len=row.seq_len,
        )
        assert row.batch_size == found > 0
        assert row.peak_allocated <= table.budget
    assert table.rows[-1].batch_size == 0
    assert table.rows[-1].peak_allocated > table.budget


def test_it_is_printed(table: OomFrontier) -> None:
    batches = [str(row.batch_size) for row in table.rows]
    lines = str(table).splitlines()
    assert lines[0] == "Largest batch of LlamaConfig in 2.0 GiB"
    assert [line.split() for line in lines[1:]] == [
        ["sequence", "r=8", "r=64"],
        ["256", *batches[:2]],
        ["1024", *batches[2:4]],
        ["1048576", "0", "0"],
    ]
    assert f"| 256 | {batches[0]} | {batches[1]} |" in table.to_markdown()


def test_the_rank_of_the_config_is_the_default() -> None:
    (row,) = oom_frontier(CONFIG, BASE, "2GiB", seq_lens=[256]).rows
    assert row.rank == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq_lens": 512}, TypeError, "seq_lens must be whole numbers"),
        ({"seq_lens": []}, ValueError, "seq_lens must not be empty"),
        ({"ranks": [0]}, ValueError, "ranks must be at least 1"),
        ({"ranks": ["8"]}, TypeError, "ranks must be a whole number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        oom_frontier(CONFIG, BASE, "2GiB", **arguments)


def test_without_advice_nothing_else_is_estimated() -> None:
    report = check_memory(BASE, CONFIG, batch_size=64, seq_len=4096, budget="2GiB", advise=False)
    assert [f.code for f in report.errors] == ["LORA502"]
    assert report.errors[0].fix == (
        'take a smaller batch_size, a shorter seq_len, gradient_checkpointing=True or quantization="nf4"; '
        "check_memory with advise=True says how much each one saves"
    )
    least = {"batch_size": 1, "seq_len": 4096, "gradient_checkpointing": True, "quantization": "nf4"}
    budget = estimate_memory(BASE, CONFIG, **least).peak_allocated - 2**20
    report = check_memory(BASE, CONFIG, **least, budget=budget, advise=False)
    assert [f.fix.partition(";")[0] for f in report.errors] == ["take a shorter seq_len"]
    with pytest.raises(TypeError, match="advise must be True or False"):
        assert_fits_memory(BASE, CONFIG, batch_size=1, seq_len=1, budget="2GiB", advise=1)


@pytest.mark.lora_slow
def test_a_search_finds_and_shrinks_what_does_not_fit() -> None:
    """Llama-2-7B in 4 bits on 24 GiB: the smallest adapter, batch 1, and the shortest sequence that is too long."""
    llama = LlamaConfig()
    shapes = training_shapes(
        quantizations=["nf4"], optimizers=["adamw_torch"], gradient_checkpointing=[False]
    )
    failed: list[tuple[LoraConfig, TrainingShape]] = []

    @settings(
        max_examples=100,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(lora_configs(targets="all-linear", variants=[]), shapes)
    def fits(config: LoraConfig, shape: TrainingShape) -> None:
        failed.append((config, shape))
        asked = {"batch_size": shape.batch_size, "seq_len": shape.seq_len, "quantization": "nf4"}
        assert_fits_memory(llama, config, budget="24GiB", advise=False, select=["LORA502"], **asked)
        failed.pop()

    with pytest.raises(LoraHealthError, match="LORA502"):
        fits()
    config, shape = failed[-1]
    assert (config.r, config.lora_dropout, shape.batch_size) == (1, 0.0, 1)
    largest = largest_that_fits(config, llama, "24GiB", vary="seq_len", quantization="nf4")
    assert shape.seq_len == largest + 1


@pytest.mark.parametrize("vary", ["batch_size", "seq_len", "r"])
def test_a_budget_that_holds_all_that_is_counted_is_no_answer(vary: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^budget holds every {vary} up to [0-9,]+, the largest that is counted"
    ):
        largest_that_fits(CONFIG, BASE, "1000TiB", vary=vary, batch_size=1, seq_len=1)


def test_a_batch_of_millions_is_estimated_as_one_of_thousands() -> None:
    many, fewer = (estimate_memory(CONFIG, BASE, batch_size=10**power, seq_len=8) for power in (7, 4))
    share, expected = (one.peak_reserved / one.peak_allocated for one in (many, fewer))
    assert many.peak_allocated > 2**40
    assert share == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("point", "named"),
    [
        ({"batch_size": 10**9, "seq_len": 8}, "batch_size must be at most 268,435,456, not 1000000000"),
        ({"batch_size": 1, "seq_len": 10**9}, "seq_len must be at most 16,777,216"),
        (
            {"batch_size": 10**6, "seq_len": 10**6},
            "batch_size times seq_len must be at most 268,435,456 tokens",
        ),
    ],
)
def test_what_no_step_can_have_is_refused_by_name(point: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        estimate_memory(CONFIG, BASE, **point)
