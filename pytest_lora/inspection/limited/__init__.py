"""Work on what strangers wrote, done first in a process of its own whose time and memory are limited.

It is started when it is first needed, kept, and gone with the process that asks. There is one bound, and one way to
keep it: no expression is recognised as harmful, and none is trusted.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from importlib.resources import files
from typing import Any

SECONDS = 0.6
"""Of a processor, for what one configuration asks. Most adapters ask for some milliseconds, the longest maps of ranks
that tools write (EVA on Llama-2-70B: 560 ranks and 560 alphas) for 0.5 s."""

_OTHERS = {-getattr(signal, name) for name in ("SIGTERM", "SIGKILL", "SIGHUP") if hasattr(signal, name)}
"""Ends that others brought about, such as a system out of memory: the work is tried once more."""


_LIMITS = {
    "MemoryError": "it takes more memory than an adapter needs",
    "RecursionError": "it is nested too deeply",
    "OverflowError": "it counts further than Python does",
}


class LimitError(Exception):
    """The work did not end within its time or memory; the message says within what."""


class WorkError(Exception):
    """The work raised an exception there; the message is its."""


class LimitedProcess:
    """One process for one piece of work after another. Of a fork each side has its own."""

    def __init__(self) -> None:
        self._renew_lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        if hasattr(os, "register_at_fork"):  # a thread that holds the lock is on one side only
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def do(self, work: str, *arguments: Any, seconds: float = SECONDS) -> tuple[Any, float]:
        """Have work of ``worker.py`` done: what came of it, and the seconds of a processor that it took.

        Args:
            work: Its name.
            arguments: What it takes, as JSON.
            seconds: Of a processor.

        Raises:
            LimitError: It did not end within its time or memory, or there can be no such process.
            WorkError: It raised something.
        """
        request = json.dumps({"work": work, "arguments": arguments, "seconds": seconds}).encode() + b"\n"
        with self._lock:
            try:
                line = self._asked(request)
                if line is None:
                    line = self._asked(request)
            except OSError as error:
                raise LimitError(f"it cannot be tried in a process of its own: {error}") from error
        if line is None:
            raise LimitError("the process in which it was tried was ended")
        if not line:
            raise LimitError(f"it does not end within {seconds:g} s")
        answer = json.loads(line)
        if "limit" in answer:
            raise LimitError(_LIMITS[answer["limit"]])
        if "error" in answer:
            raise WorkError(answer["error"])
        return answer["result"], answer["seconds"]

    def _asked(self, request: bytes) -> bytes | None:
        """The answer; empty where the process ended itself, None where it was ended by others."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            self._end()
            return None
        line = process.stdout.readline()
        if line.endswith(b"\n"):
            return line
        self._end()
        return None if process.returncode in _OTHERS else b""

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():
            source = (files(__package__) / "worker.py").read_text(encoding="utf-8")
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was not written
                pass

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()


limited = LimitedProcess()
atexit.register(limited.close)
