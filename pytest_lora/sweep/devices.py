"""One GPU for each worker process of a machine."""

from __future__ import annotations

import getpass
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_held: list[FileLock] = []
"""The lock on this process's GPU; the system lets it go when the process ends, however it ends."""


def claim_gpu() -> None:
    """In a worker process that sees several GPUs, make one current that no other worker has; do nothing elsewhere.

    Where there are more workers than GPUs, the rest share them. A worker that sees one GPU, as under dask-cuda or
    Slurm's ``--gpus-per-task=1``, has been given its own already.
    """
    if _held or multiprocessing.parent_process() is None or torch.cuda.device_count() < 2:
        return
    count = torch.cuda.device_count()
    for index in range(count):
        lock = FileLock(_folder() / f"{torch.cuda.get_device_properties(index).uuid}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        torch.cuda.set_device(index)
        return
    torch.cuda.set_device(os.getpid() % count)


def _folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir(), f"pytest-lora-sweep-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
