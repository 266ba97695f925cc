"""One GPU for each worker process, on a machine whose GPUs are simulated."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from pytest_lora.sweep import trial

FORK = multiprocessing.get_context("fork")


def claim(count: int, connection: object) -> None:
    """In a worker: claim a GPU, say which, and hold it until told to end."""
    current = [0]
    torch.cuda.device_count = lambda: count
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"simulated-{index}")
    torch.cuda.set_device = lambda index: current.__setitem__(0, index)
    trial.claim_gpu()
    trial.claim_gpu()  # the next trial of this worker
    connection.send((current[0], len(trial._held)))
    connection.recv()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))


def start(count: int) -> tuple[multiprocessing.process.BaseProcess, object, tuple[int, int]]:
    here, there = FORK.Pipe()
    process = FORK.Process(target=claim, args=(count, there))
    process.start()
    return process, here, here.recv()


def test_workers_get_a_gpu_each_and_a_killed_one_gives_its_own_back() -> None:
    workers = [start(3) for _ in range(3)]
    try:
        assert sorted(gpu for _, _, (gpu, _) in workers) == [0, 1, 2]
        assert all(held == 1 for _, _, (_, held) in workers)
        more = start(3)
        workers.append(more)
        assert more[2][1] == 0  # it shares one
        killed, _, (gpu, _) = workers[1]
        killed.kill()
        killed.join()
        workers.append(start(3))
        assert workers[-1][2] == (gpu, 1)
    finally:
        for process, _, _ in workers:
            process.kill()
            process.join()


def test_one_gpu_or_no_worker_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    process, _, (gpu, held) = start(1)
    process.kill()
    process.join()
    assert (gpu, held) == (0, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("asked in the main process"))
    trial.claim_gpu()
