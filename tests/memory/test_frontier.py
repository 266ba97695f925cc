"""How far a budget goes, as a table; and a search without advice."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import (
    OomFrontier,
    assert_fits_memory,
    check_memory,
    largest_that_fits,
    oom_frontier,
)

BASE = LlamaConfig(num_hidden_layers=4, hidden_size=512, intermediate_size=1024, num_attention_heads=8)
CONFIG = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def table() -> OomFrontier:
    return oom_frontier(BASE, CONFIG, "2GiB", seq_lens=[256, 1024, 2**20], ranks=[8, 64])


def test_each_batch_is_the_largest_that_fits(table: OomFrontier) -> None:
    assert [(row.seq_len, row.rank) for row in table.rows] == [
        (length, rank) for length in (256, 1024, 2**20) for rank in (8, 64)
    ]
    for row in table.rows[:4]:
        found = largest_that_fits(
            BASE,
            LoraConfig(r=row.rank, target_modules=["q_proj", "v_proj"]),
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
    (row,) = oom_frontier(BASE, CONFIG, "2GiB", seq_lens=[256]).rows
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
        oom_frontier(BASE, CONFIG, "2GiB", **arguments)


def test_without_advice_nothing_else_is_estimated() -> None:
    report = check_memory(BASE, CONFIG, batch_size=64, seq_len=4096, budget="2GiB", advise=False)
    assert [f.code for f in report.errors] == ["LORA502"]
    assert report.errors[0].fix == "run it again with advise=True, the default, to see what would fit"
    with pytest.raises(TypeError, match="advise must be True or False"):
        assert_fits_memory(BASE, CONFIG, batch_size=1, seq_len=1, budget="2GiB", advise=1)  # type: ignore[arg-type]
