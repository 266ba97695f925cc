"""A process beside the session that says in which GPU test the session ended, if it ends in one.

bitsandbytes calls ``exit(1)`` where CUDA fails below it, and a crash of the driver raises nothing either: the session
is gone before it can say anything. The process beside it reads the name of the test that runs, and speaks when the
session closes their pipe by ending.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

MESSAGE = """
pytest-lora: this process ended in the middle of {test}, without an exception.
Below Python, bitsandbytes ends the process by exit(1) where CUDA fails, often after an earlier error that broke CUDA; a
crash or os._exit looks the same. What it printed went with pytest's capture: run this test alone with -s and
CUDA_LAUNCH_BLOCKING=1.
"""


class LastWords:
    """The process beside the session, started with the first GPU test."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._process: subprocess.Popen[str] | None = None

    def begin(self, test: str) -> None:
        """Say that a test runs."""
        if self._process is None:
            capture = self._config.pluginmanager.getplugin("capturemanager")
            # Where no process can be started, there are no last words.
            with suppress(OSError), capture.global_and_fixture_disabled() if capture else nullcontext():
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the session
                )
        self._write(test)

    def end(self) -> None:
        """Say that no test runs."""
        self._write("")

    def close(self) -> None:
        """End the process, which has nothing to say; a child of a test may still hold the pipe open."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            if self._process.stdin:
                with suppress(OSError):
                    self._process.stdin.close()
            self._process = None

    def _write(self, line: str) -> None:
        if self._process is not None and self._process.stdin:
            with suppress(OSError):  # it is gone, and with it its use
                self._process.stdin.write(ascii(line)[1:-1] + "\n")
                self._process.stdin.flush()


def listen() -> None:
    """Read the names of tests until the session ends; speak if it was in one."""
    test = ""
    for line in sys.stdin:
        test = line.strip()
    if test:
        print(MESSAGE.format(test=test), file=sys.stderr, flush=True)


if __name__ == "__main__":
    listen()
