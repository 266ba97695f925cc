"""Silence of the libraries while they do what nobody needs to hear of.

Imports none of them at once, as some speak when they are imported: bitsandbytes 0.50 does on CPUs with AVX512-BF16.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


class Alone:
    """One thread at a time, which may come in again: what two change and put back in turn would stay as one had it.

    That is so of the weights of a model that two threads check, and of functions that libraries (PEFT and accelerate
    among them) put in the place of torch's for a while. Of a fork each side has its own.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


alone = Alone()


@contextmanager
def warnings_only_warn() -> Iterator[None]:
    """Where a session makes errors of warnings, those of libraries that we call for the user are shown instead.

    They are about calls of ours, and no test of the user's could mend them. What libraries are going to change, as in a
    name of transformers that PEFT still asks for, is not shown either.
    """
    module: Any = warnings
    with warnings.catch_warnings():
        before = list(module.filters)
        module.resetwarnings()  # which also tells the module that its filters are others
        module.filters[:] = [
            ("default", *rest) if action == "error" else (action, *rest) for action, *rest in before
        ]
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide progress bars, log lines and warnings of the libraries, and put all settings back afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as transformers_logging

        progress: Any = transformers_logging
        loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "accelerate")]
        levels = [logger.level for logger in loggers]
        bars = progress.is_progress_bar_enabled()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if bars:
            progress.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                progress.enable_progress_bar()


class Collector:
    """Python's garbage collector, which several threads may pause: it is as it was when the last of them goes on.

    What the process wants of it is asked and said here, as during a pause the collector itself does not tell.
    """

    def __init__(self) -> None:
        self._wanted = True
        self._pauses: dict[int, int] = {}
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        """After a fork the other threads are gone, and their pauses with them."""
        self._lock = threading.RLock()
        if self._pauses:
            me = threading.get_ident()
            self._pauses = {me: self._pauses[me]} if me in self._pauses else {}
            self._set()

    def is_wanted(self) -> bool:
        """Whether it runs outside of pauses."""
        with self._lock:
            return self._wanted if self._pauses else gc.isenabled()

    def want(self, wanted: bool) -> None:
        """Have it run, or not, outside of pauses."""
        with self._lock:
            self._wanted = wanted
            self._set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep it from running: it would free storages at moments that differ from run to run, and go through hundreds
        of thousands of facts again and again, which hold no circles."""
        me = threading.get_ident()
        before = self._pauses.get(me, 0)
        try:
            with self._lock:
                self._wanted = self.is_wanted()
                self._pauses[me] = before + 1
                self._set()
            yield
        finally:
            with self._lock:
                self._pauses[me] = before
                if not before:
                    del self._pauses[me]
                self._set()

    def _set(self) -> None:
        if self._wanted and not self._pauses:
            gc.enable()
        else:
            gc.disable()


collector = Collector()


_EXPLAINER = "hypothesis.internal.scrutineer"
"""Where Hypothesis looks which lines a failing example runs, from its first failure on."""


@contextmanager
def unexplained() -> Iterator[None]:
    """Keep Hypothesis from noting the lines that run: they are none of the test's, and take three times as long so.

    Tracers of others, a debugger or coverage, stay.
    """
    before = sys.gettrace()
    if type(getattr(before, "__self__", None)).__module__ == _EXPLAINER:
        with _put_back(sys.settrace, before, None):
            yield
        return
    monitoring: Any = getattr(sys, "monitoring", None)  # Python 3.12 and newer
    tools = [n for n in range(6) if monitoring.get_tool(n) == "scrutineer"] if monitoring else []
    if not tools:
        yield
        return
    with _put_back(partial(monitoring.set_events, tools[0]), monitoring.get_events(tools[0]), 0):
        yield


@contextmanager
def _put_back(put: Callable[[Any], object], before: Any, meanwhile: Any) -> Iterator[None]:
    put(meanwhile)
    try:
        yield
    finally:
        put(before)
