"""Signals that wait while something must not be left half done."""

from __future__ import annotations

import signal
import threading
from types import CodeType, FrameType
from typing import Any


class Interrupts:
    """Takes the place of the handlers of all signals, and lets those wait that come at a bad time.

    A handler runs between any two instructions of Python, so a flag set inside a ``finally`` comes too late for a
    Ctrl-C right before it. What is shielded is therefore told from the stack that the signal came upon.

    Args:
        shielded: Code of functions that no signal interrupts, nor what they call.
    """

    def __init__(self, *shielded: CodeType) -> None:
        self._shielded = frozenset(shielded)
        self._handlers: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._raised: list[BaseException] = []

    def hold(self) -> None:
        """Begin. Python runs handlers in the main thread alone, so another one has nothing to hold."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._handlers = {number: signal.getsignal(number) for number in signal.Signals}
        for number, handler in self._handlers.items():
            if callable(handler):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        below = frame
        while below is not None:
            if below.f_code in self._shielded:
                self._waiting.append(number)
                return
            below = below.f_back
        self._handlers[number](number, frame)

    def release(self) -> None:
        """Put the handlers back, also where a signal has its own in the meantime."""
        while True:
            try:
                for number, handler in self._handlers.items():
                    if handler is not None and signal.getsignal(number) is not handler:
                        signal.signal(number, handler)
                return
            except BaseException as error:  # of a handler that is back already; the others follow
                self._raised.append(error)

    def deliver(self, frame: FrameType | None) -> None:
        """Let the signals go on that waited, as if they came upon a frame; what their handlers raise is raised."""
        while self._waiting:
            number = self._waiting.pop(0)
            self._handlers[number](number, frame)
        while self._raised:
            raise self._raised.pop(0)
