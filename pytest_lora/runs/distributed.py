"""Several processes: run a function on every rank."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from filelock import FileLock, Timeout

from pytest_lora.files import write_whole
from pytest_lora.values import require_items, require_number, require_one_of, require_whole, shown

Backend = Literal["gloo", "nccl"]

MOST_RANKS = 1024
"""Processes on one machine: each imports torch, and takes a few hundred MiB for that."""

GRACE = 2.0
"""Seconds between the word of a rank that ran out of time and its end, with which the launcher ends the others."""


class RanksFailedError(AssertionError):
    """A rank raised, died or did not end in time. The message has the traceback of each that did."""


def is_first_rank() -> bool:
    """Whether this process speaks for its group: each rank judges, and the first one tells."""
    dist = sys.modules.get("torch.distributed")
    return dist is None or not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@dataclass(frozen=True)
class _Task:
    """What a rank does; travels to it by pickle."""

    module: str
    name: str
    arguments: tuple[Any, ...]
    backend: str
    timeout: float
    folder: str


def run_distributed(
    fn: Callable[..., Any],
    world_size: int = 2,
    backend: Backend = "gloo",
    *,
    args: Sequence[Any] = (),
    timeout: float = 120.0,
) -> list[Any]:
    """Run a function in several new processes of this machine, as torchrun would, and wait for them.

    Each rank has a process group: ``torch.distributed`` is set up before the function and taken down after it.
    With ``"nccl"`` rank N has ``cuda:N`` as its current device.

    Args:
        fn: A function of a module that the ranks can import, not a lambda nor one defined inside another.
        world_size: Number of ranks, 1 or more.
        backend: ``"gloo"`` (CPU) or ``"nccl"`` (one GPU each).
        args: Positional arguments for it, the same on each rank; they are pickled.
        timeout: Seconds that a rank may take, from when it has started; then it is ended.

    Returns:
        What the function returned, by rank; pickled, so tensors should be on the CPU.

    Raises:
        TypeError: ``fn`` cannot be imported by its name.
        ValueError: ``world_size``, ``backend`` or ``timeout`` is none, or NCCL has fewer GPUs than ranks.
        RanksFailedError: A rank raised, died or took too long; has its traceback.
    """
    _check(fn, world_size, backend, timeout)
    given = require_items("args", args, "a list of arguments")
    if backend == "nccl":
        _require_gpus(world_size)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder:
        # The launcher's own way to a free port looks through the sources of the whole call stack for its log, which
        # takes seconds where many modules are loaded. Of this port it takes the server that is there.
        store = importlib.import_module("torch.distributed").TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True
        )
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=Path(folder).name,
            rdzv_backend="static",
            rdzv_endpoint=f"127.0.0.1:{store.port}",
            rdzv_configs={"rank": 0},
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        task = _Task(fn.__module__, fn.__qualname__, given, backend, timeout, folder)
        failure = ""
        try:
            with _own_signal_handlers():
                results = elastic_launch(config, _rank)(task)
        except ChildFailedError as error:
            exits = {rank: one.exitcode for rank, one in error.failures.items()}
            failure = _failure_text(Path(folder), fn.__qualname__, world_size, exits)
    if failure:
        raise RanksFailedError(failure)
    return [results[rank] for rank in range(world_size)]


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put back, in the main thread, the handlers of signals that torch's launcher replaces and leaves replaced."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _check(fn: Any, world_size: object, backend: object, timeout: object) -> None:
    require_whole("world_size", world_size, least=1, most=MOST_RANKS)
    require_one_of("backend", backend, get_args(Backend))
    require_number("timeout", timeout, above=0.0, most=threading.TIMEOUT_MAX)
    name, home = getattr(fn, "__qualname__", ""), getattr(fn, "__module__", "")
    module = sys.modules.get(home) if isinstance(home, str) else None
    if not callable(fn) or module is None or vars(module).get(name) is not fn:
        raise TypeError(
            f"fn must be a function at the top level of a module, which each rank imports, not {shown(fn)}"
        )


def _require_gpus(world_size: int) -> None:
    """NCCL takes one rank a GPU; a rank without one would raise "invalid device ordinal"."""
    import torch

    if not torch.distributed.is_nccl_available():
        raise ValueError(f"backend='nccl', but torch {torch.__version__} is built without it; use 'gloo'")
    count = torch.cuda.device_count()
    if count < world_size:
        raise ValueError(
            f"backend='nccl' needs a GPU for each of {world_size} ranks, and this process sees {count}; mark the test "
            f"@pytest.mark.lora_gpu(count={world_size}), or use 'gloo'"
        )


def _rank(task: _Task) -> Any:
    """One rank: set up, run, take down. What goes wrong is written where the launching process reads it."""
    import torch
    import torch.distributed as dist

    home = Path(task.folder)
    rank = os.environ["RANK"]
    alive = FileLock(_note(home, "alive", rank))
    alive.acquire()
    with open(_note(home, "hang", rank), "w") as stacks:
        watchdog = threading.Timer(task.timeout, _give_up, [stacks])
        watchdog.daemon = True
        watchdog.start()
        # Where a library keeps Python from running, that one never gets its turn.
        faulthandler.dump_traceback_later(task.timeout + 2 * GRACE, exit=True, file=stacks)
        try:
            fn = getattr(importlib.import_module(task.module), task.name)
            if task.backend == "nccl":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(task.backend)
            result = fn(*task.arguments)
            dist.destroy_process_group()
        except BaseException:
            write_whole(_note(home, "error", rank), traceback.format_exc())
            _note_death_of_others(home, int(os.environ["WORLD_SIZE"]), int(rank))
            # The other ranks may wait for this one for ever; the launcher ends them when this one is gone.
            os._exit(1)
        finally:
            watchdog.cancel()
            faulthandler.cancel_dump_traceback_later()
        _note(home, "done", rank).touch()
        return result


def _give_up(stacks: TextIO) -> None:
    """Write where every thread of this rank is, leave the other ranks the time to do so, and end it."""
    faulthandler.dump_traceback(file=stacks, all_threads=True)
    time.sleep(GRACE)
    os._exit(1)


def _note(home: Path, what: str, rank: object) -> Path:
    return home / f"{what}-{rank}.txt"


def _note_death_of_others(home: Path, world_size: int, own: int) -> None:
    """Note ranks that died without a word, which the others notice before the system has let go of their locks.

    The launcher reports only one rank, perhaps not the one that was the cause.
    """
    deadline = time.monotonic() + GRACE / 2
    while time.monotonic() < deadline:
        silent = [
            rank
            for rank in range(world_size)
            if rank != own and not any(_note(home, what, rank).exists() for what in ("error", "done"))
        ]
        dead = [rank for rank in silent if _is_dead(home, rank)]
        if dead or not silent:
            return
        time.sleep(0.05)


def _is_dead(home: Path, rank: int) -> bool:
    """Whether a rank began and is gone, which is noted then."""
    if not _note(home, "alive", rank).exists():
        return False
    alive = FileLock(_note(home, "alive", rank))
    try:
        alive.acquire(timeout=0)
    except Timeout:
        return False
    alive.release()
    _note(home, "dead", rank).touch()
    return True


def _failure_text(home: Path, name: str, world_size: int, exits: dict[int, int]) -> str:
    """What became of the ranks that failed: the cause first, and of those that failed after it the last line."""
    causes, errors = [], []
    for rank in range(world_size):
        error, hang = _note(home, "error", rank), _note(home, "hang", rank)
        stacks = hang.read_text().rstrip() if hang.exists() else ""
        if error.exists():
            errors.append((error.stat().st_mtime_ns, rank, error.read_text().rstrip()))
        elif stacks:
            causes.append(f"rank {rank} of {world_size} did not end in time:\n{stacks}")
        elif _note(home, "dead", rank).exists():
            causes.append(f"rank {rank} of {world_size} died without raising")
        elif exits.get(rank, 0) > 0:  # the launcher itself ends ranks by signals, whose codes are negative
            causes.append(f"rank {rank} of {world_size} ended with exit code {exits[rank]}")
    if not causes and not errors:
        causes = [f"rank {rank} of {world_size} ended with exit code {code}" for rank, code in exits.items()]
    for _, rank, text in sorted(errors):
        if causes:
            causes.append(f"rank {rank} of {world_size} failed after that: {text.splitlines()[-1]}")
        else:
            causes.append(f"rank {rank} of {world_size} raised:\n{text}")
    return f"{name} failed\n\n" + "\n\n".join(causes)
