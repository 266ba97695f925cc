"""Which rank? A whole sweep on a laptop: progress, table, picture and choice, in a few seconds.

    pytest examples/test_rank_sweep.py -s

The data are made by code: a teacher whose output head differs from the built-in base's by a change of rank 4, so that
the right answer is known. With data of your own, three functions take its place: one that makes the base, one that
trains, one that measures.
"""

from __future__ import annotations

from pathlib import Path

from pytest_lora import assert_rank_suffices, rank_sweep, suggest_rank
from pytest_lora.bases.tiny import tiny_config
from pytest_lora.bases.tiny.known_rank import KnownRankTask


def test_which_rank(tmp_path: Path) -> None:
    print(f"\nadvice: {suggest_rank(tiny_config(), examples=5_000, tokens_per_example=20)}\n")

    task = KnownRankTask(rank=4)
    result = rank_sweep(
        task.make_model,
        task.train,
        task.evaluate,
        ranks=(2, 4, 8, 16),
        fraction=0.5,
        seeds=2,
        config=task.config,
        metric="explained",
        data="logits of the teacher",
        journal=tmp_path / "sweep.jsonl",
        progress=True,
    )
    choice = result.choose()
    picture = result.plot(tmp_path / "ranks.png")
    print(f"\n{result.table()}\n\n{choice}\n\npicture: {picture}")

    assert choice.rank == 4
    assert_rank_suffices(result, 4)
