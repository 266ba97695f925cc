"""A task of known rank, and that a sweep finds it."""

from __future__ import annotations

import pickle

import pytest
import torch

from pytest_lora import rank_sweep
from pytest_lora.bases.tiny.known_rank import KnownRankTask


def test_the_change_has_exactly_its_rank_and_equal_directions() -> None:
    task = KnownRankTask(3, seed=1)
    change = task._change
    assert change.shape == (320, 128)
    values = torch.linalg.svdvals(task._texts["train"] @ change.T)
    assert torch.linalg.matrix_rank(change) == 3
    assert values[:3] == pytest.approx(values[0].expand(3), rel=1e-3)


def test_the_task_follows_from_its_seed_and_pickles_small() -> None:
    state = torch.get_rng_state()
    task = KnownRankTask(2, seed=5)
    again = pickle.loads(pickle.dumps(task))
    assert len(pickle.dumps(task)) < 200
    assert torch.equal(task._change, again._change)
    assert not torch.equal(task._change, KnownRankTask(2, seed=6)._change)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sweep_finds_the_rank() -> None:
    """One of the 40 cases of ``benchmarks/known_rank.py``."""
    task = KnownRankTask(2, seed=0)
    result = rank_sweep(
        task.make_model,
        task.train,
        task.evaluate,
        ranks=(1, 2, 4),
        fraction=0.5,
        config=task.config,
        progress=False,
    )
    assert not result.failed
    assert result.choose().rank == 2
    assert result.before == pytest.approx(0)
    shares = result.shares()
    assert shares[1] == pytest.approx(0.5, abs=0.1)
    assert shares[2] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rank", [0, 65, 2.0, True])
def test_ranks_out_of_range(rank: object) -> None:
    with pytest.raises(ValueError, match=f"^rank must be an integer from 1 to 64, not {rank!r}$"):
        KnownRankTask(rank)
