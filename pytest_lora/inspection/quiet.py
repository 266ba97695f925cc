"""Silence of the libraries while they do what nobody needs to hear of.

Imports none of them at once, as some speak when they are imported: bitsandbytes 0.50 does on CPUs with AVX512-BF16.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def warnings_only_warn() -> Iterator[None]:
    """Where a session makes errors of warnings, those of libraries that we call for the user are shown instead.

    They are about calls of ours (a name that transformers is going to drop, say), and no test of the user's could mend
    them.
    """
    module: Any = warnings
    with warnings.catch_warnings():
        before = list(module.filters)
        module.resetwarnings()  # which also tells the module that its filters are others
        module.filters[:] = [
            ("default", *rest) if action == "error" else (action, *rest) for action, *rest in before
        ]
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


@contextmanager
def collected_late() -> Iterator[None]:
    """Keep the garbage collector from running: it would free storages at moments that differ from run to run, and go
    through hundreds of thousands of facts again and again, which hold no circles."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()
