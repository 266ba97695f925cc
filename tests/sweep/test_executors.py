"""Trials in other processes: the same numbers, and nothing lost when a worker is killed in the middle of a trial."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pytest_lora import SweepResult, rank_sweep
from pytest_lora.sweep import TrainOn
from tests.sweep import toys

SWEEP = {"ranks": (1, 2, 4), "seeds": 2, "fraction": 0.5, "config": toys.CONFIG, "progress": False}


def pool(workers: int = 2) -> ProcessPoolExecutor:
    """Forked, so that no worker has to import torch once more."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))


def numbers(result: SweepResult) -> list[tuple[object, ...]]:
    """What does not depend on the clock."""
    return [
        (r.rank, r.seed, r.metric, r.losses, r.flops, r.trainable, r.data, r.failure) for r in result.trials
    ]


@pytest.fixture(scope="module")
def here() -> SweepResult:
    return rank_sweep(toys.make_model, toys.train, toys.evaluate, **SWEEP)


def test_a_process_pool_gives_the_same_numbers(here: SweepResult) -> None:
    with pool() as executor:
        result = rank_sweep(toys.make_model, toys.train, toys.evaluate, executor=executor, **SWEEP)
        assert numbers(result) == numbers(here)
        assert result.before == here.before
        assert executor.submit(os.getpid).result() != os.getpid()  # the user's pool is still open


def test_threads_take_turns_and_give_the_same_numbers(here: SweepResult) -> None:
    with ThreadPoolExecutor(3) as executor:
        result = rank_sweep(toys.make_model, toys.train, toys.evaluate, executor=executor, **SWEEP)
    assert numbers(result) == numbers(here)


def test_a_pool_halves_as_one_process_does() -> None:
    pytest.importorskip("optuna")
    rates = {"learning_rates": (1e-3, 3e-3, 1e-2, 3e-2), "halving": 4}
    given = SWEEP | rates | {"ranks": (2, 4)}
    train = TrainOn(toys.data(), loss_fn=toys.loss)
    alone = rank_sweep(toys.make_model, train, toys.evaluate, **given)
    with pool() as executor:
        result = rank_sweep(toys.make_model, train, toys.evaluate, executor=executor, **given)
    assert numbers(result) == numbers(alone)
    assert [row.budget for row in result.trials].count(1.0) == 4


def test_a_killed_worker_of_a_pool_loses_nothing(here: SweepResult, tmp_path: Path) -> None:
    train = partial(toys.train_and_be_killed_once, str(tmp_path), 2)
    with pool() as executor:
        result = rank_sweep(
            toys.make_model, train, toys.evaluate, executor=executor, journal=tmp_path / "j", **SWEEP
        )
    assert (tmp_path / "killed").exists()
    assert numbers(result) == numbers(here)
    kept = (tmp_path / "j").read_text().splitlines()
    assert len(kept) == 1 + 1 + 6  # settings, before, trials: each once


def test_a_trial_that_always_kills_its_worker_is_the_only_one_lost(here: SweepResult, tmp_path: Path) -> None:
    train = partial(toys.train_and_be_killed, str(tmp_path), 2)
    with pool() as executor:
        result = rank_sweep(toys.make_model, train, toys.evaluate, executor=executor, **SWEEP)
    assert [(row.rank, row.seed, row.failure and row.failure.kind) for row in result.failed] == [
        (2, 0, "worker died"),
        (2, 1, "worker died"),
    ]
    assert [row for row in numbers(result) if row[0] != 2] == [row for row in numbers(here) if row[0] != 2]
    assert "BrokenProcessPool" in str(result.failed[0].failure)


def test_what_a_process_pool_cannot_take_is_refused_before_any_trial(tmp_path: Path) -> None:
    with (
        pool() as executor,
        pytest.raises(TypeError, match=r"^train cannot be sent to the processes of executor"),
    ):
        rank_sweep(
            toys.make_model,
            lambda model, plan: None,
            toys.evaluate,
            executor=executor,
            journal=tmp_path / "j",
        )
    assert not (tmp_path / "j").exists()


class _OtherExecutor:
    def submit(self, function: object, *args: object) -> int:
        return 1


def test_what_gives_no_futures_is_named() -> None:
    message = r"^executor must give futures of concurrent.futures, but _OtherExecutor\.submit gave a int$"
    with pytest.raises(TypeError, match=message):
        rank_sweep(toys.make_model, toys.train, toys.evaluate, executor=_OtherExecutor(), **SWEEP)


def sweep_here(folder: Path) -> SweepResult:
    return rank_sweep(
        partial(toys.make_model_or_wait, str(folder)),
        toys.noting(folder),
        toys.evaluate,
        journal=folder / "j",
        **SWEEP,
    )


def test_a_killed_sweep_goes_on_where_it_stopped(here: SweepResult, tmp_path: Path) -> None:
    (tmp_path / "pause").touch()
    process = multiprocessing.get_context("fork").Process(target=sweep_here, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert toys.starts(tmp_path) == ["1 0", "1 1", "2 0", "4 0"]
    with (tmp_path / "j").open("a") as file:
        file.write('{"trial": {"rank": 2, "se')  # as a kill in the middle of a line leaves it

    (tmp_path / "pause").unlink()
    result = sweep_here(tmp_path)
    assert toys.starts(tmp_path) == ["1 0", "1 1", "2 0", "2 1", "4 0", "4 1"]  # none twice
    assert numbers(result) == numbers(here)
    assert result.before == here.before


def test_a_client_of_dask_gives_the_same_numbers(here: SweepResult) -> None:
    distributed = pytest.importorskip("distributed")
    asked = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**asked) as cluster, distributed.Client(cluster) as client:
        result = rank_sweep(
            toys.make_model, toys.train, toys.evaluate, executor=client.get_executor(), **SWEEP
        )
    assert numbers(result) == numbers(here)


@pytest.mark.lora_slow  # each of three workers imports torch
def test_dask_starts_the_trial_of_a_killed_worker_again(here: SweepResult, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    dask = pytest.importorskip("dask")
    train = partial(toys.train_and_be_killed_once, str(tmp_path), 2)
    settings = {
        # A fork would take over threads of other tests' libraries in whatever state they are.
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.comm.timeouts.connect": "60s",
    }
    start = time.monotonic()
    with (
        dask.config.set(settings),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        print("cluster", time.monotonic() - start)
        result = rank_sweep(
            toys.make_model,
            train,
            toys.evaluate,
            executor=client.get_executor(),
            journal=tmp_path / "j",
            **SWEEP,
        )
        print("sweep", time.monotonic() - start)
    assert (tmp_path / "killed").exists()
    assert numbers(result) == numbers(here)
