"""Sessions of pytest as processes of their own, which take the libraries from this one: loading them takes seconds.

For tests that say nothing about what is imported when. The package itself is loaded anew.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from _pytest.assertion.rewrite import AssertionRewritingHook

OWN = ("pytest_lora", "tests", "conftest")

_forgotten: tuple[str, ...] = OWN
_ends_of_workers: list[int] = []


def run_forked(pytester: pytest.Pytester, *args: str, forget: tuple[str, ...] = ()) -> pytest.RunResult:
    """Run pytest in a process of its own, whose workers of pytest-xdist are forked as well.

    Args:
        forget: Packages beside this one that are loaded anew.
    """
    begun = time.perf_counter()
    folder = pytester.path.with_name(f"{pytester.path.name}-basetemp-{time.monotonic_ns()}")

    def session() -> int:
        import execnet.gateway_io

        execnet.gateway_io.Popen2IOMaster = ForkedIO
        return int(pytest.main([f"--basetemp={folder}", *args]))

    done = outcome(session, cwd=pytester.path, forget=forget)
    for stream, text in ((sys.stdout, done.stdout), (sys.stderr, done.stderr)):
        print(text, file=stream)
    lines = done.stdout.splitlines(), done.stderr.splitlines()
    return pytest.RunResult(done.returncode, *lines, time.perf_counter() - begun)


def outcome(
    work: Callable[[], object], *, cwd: Path | None = None, forget: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """What became of a function in a process of its own: its number, or what it exits with, is the exit status."""
    with TemporaryFile("w+", encoding="utf-8") as out, TemporaryFile("w+", encoding="utf-8") as err:

        def apart() -> int:
            global _forgotten
            _forgotten = (*OWN, *forget)
            os.chdir(cwd or ".")
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            begin_anew()
            return int(work() or 0)

        code = os.waitstatus_to_exitcode(os.waitpid(fork(apart), 0)[1])
        for stream in (out, err):
            stream.seek(0)
        return subprocess.CompletedProcess("", code, out.read(), err.read())


def fork(work: Callable[[], int]) -> int:
    """The process in which this function runs and whose exit status it gives."""
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # what is here is not thrown away in the fork as well
    status = 1
    try:
        status = work()
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # a full disk, or a pipe that nobody reads: it never goes on as a second copy of this session
            os._exit(status)


def begin_anew() -> None:
    """Forget the session that this process is a fork of: its streams, its import hook, and what it knows of us."""
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rww"[n], 1, closefd=False) for n in range(3))
    tempfile.tempdir = None  # is asked of the environment again
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AssertionRewritingHook)]
    for name in [name for name in sys.modules if name.partition(".")[0] in _forgotten]:
        del sys.modules[name]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [path for path in paths if path not in sys.path]


class ForkedIO:
    """Takes the place of ``execnet.gateway_io.Popen2IOMaster``: the worker is a fork, not a new interpreter."""

    def __new__(cls, args: list[str], execmodel: Any) -> Any:
        from execnet.gateway_base import Popen2IO

        to_worker, from_worker = os.pipe(), os.pipe()

        def worker() -> int:
            os.dup2(to_worker[0], 0)
            os.dup2(from_worker[1], 1)
            for descriptor in {*to_worker, *from_worker, *_ends_of_workers}:
                with suppress(OSError):  # that of a worker that died is closed already
                    os.close(descriptor)
            begin_anew()
            exec(args[-1], {"__name__": "__main__"})
            return 0

        pid = fork(worker)
        os.close(to_worker[0])
        os.close(from_worker[1])
        _ends_of_workers.extend((to_worker[1], from_worker[0]))
        io: Any = Popen2IO(os.fdopen(to_worker[1], "wb"), os.fdopen(from_worker[0], "rb"), execmodel)
        io.wait = lambda: os.waitpid(pid, 0)[1]
        io.kill = lambda: os.kill(pid, 9)
        return io


def fork_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks of ``run_distributed`` be forks, not new interpreters."""
    from torch.distributed.launcher import api

    real = api.LaunchConfig

    def made(**fields: Any) -> Any:
        gc.collect()
        gc.freeze()  # a store of ranks that are gone, thrown away by a fork, would wait for a thread that it has not
        return real(**{**fields, "start_method": "fork"})

    monkeypatch.setattr(api, "LaunchConfig", made)
