"""Settings of the process: random states and global switches, taken and put back.

The random states are Python's, NumPy's, and torch's on the CPU and on accelerators.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_lora.inspection.quiet import collector
from pytest_lora.inspection.state.precision import Float32Precision

_cuda: Any = torch.cuda

_DEVICES = ("cpu", "cuda")


def cuda_in_use() -> bool:
    """Whether this process has used CUDA; asking never starts it."""
    return bool(_cuda.is_initialized())


def _others() -> dict[str, tuple[Any, Any]]:
    """How the random state of each accelerator in use beside CUDA is read and written; asking starts none.

    One that is first used later has no state here that it could go back to.
    """
    found: dict[str, tuple[Any, Any]] = {}
    xpu: Any = torch.xpu
    mps: Any = torch.mps
    if xpu.is_initialized():
        found["xpu"] = xpu.get_rng_state_all, xpu.set_rng_state_all
    if torch.backends.mps.is_available():
        found["mps"] = mps.get_rng_state, mps.set_rng_state
    return found


class RandomStates:
    """Every random state of the process, as it is now; taking it starts nothing."""

    def __init__(self) -> None:
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = (numpy.random, numpy.random.get_state()) if numpy else None
        self._cpu = torch.get_rng_state()
        self._of_others = {name: read() for name, (read, _) in _others().items()}
        self._of_cuda = _cuda.get_rng_state_all() if cuda_in_use() else None
        # Until CUDA is started, torch keeps the seeds for it here: in two attributes, and their order in a third.
        seeds = vars(_cuda._lazy_seed_tracker)
        self._seeds = {
            name: list(value) if isinstance(value, list) else value for name, value in seeds.items()
        }

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        if self._numpy:
            generator, state = self._numpy
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        for name, (_, write) in _others().items():
            if name in self._of_others:
                write(self._of_others[name])
        if self._of_cuda is not None:
            _cuda.set_rng_state_all(self._of_cuda)
            return
        vars(_cuda._lazy_seed_tracker).update(self._seeds)
        if cuda_in_use():
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Leave CUDA, started since, as it would begin: with the seeds that waited, else with one drawn by chance."""
        for generator in _cuda.default_generators:
            generator.seed()
        for call in _cuda._lazy_seed_tracker.get_calls():
            if call is not None:
                call[0]()


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that a process has once: how it is read, and how what was read is put back.

    Attributes:
        compared: Whether it is written only where it differs; else ``write`` looks for itself, or costs no more.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    compared: bool = True


def _read_device() -> torch.device | None:
    """The default device where one was set; unset, torch takes the CPU at no cost."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _write_device(device: torch.device | None) -> None:
    make: Any = torch.set_default_device
    make(device)


def _nesting() -> int:
    """How many contexts of autocast are entered; with the last one torch forgets the weights that it has cast."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _read_autocast() -> tuple[Any, ...]:
    switches = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)
    return _nesting(), torch.is_autocast_cache_enabled(), *switches


def _write_autocast(before: tuple[Any, ...]) -> None:
    depth, cached, *switches = before
    now = _nesting()
    while now > depth:
        now = torch.autocast_decrement_nesting()
    while now < depth:
        now = torch.autocast_increment_nesting()
    if not depth:
        torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(cached)
    for device, (enabled, dtype) in zip(_DEVICES, switches, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _read_deterministic() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def _write_deterministic(before: tuple[bool, ...]) -> None:
    enabled, warn_only, cudnn, benchmark = before
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.backends.cudnn.deterministic = cudnn
    torch.backends.cudnn.benchmark = benchmark


def _read_filters() -> tuple[Any, ...]:
    module: Any = warnings
    return module.filters, list(module.filters), module.showwarning


def _write_filters(before: tuple[Any, ...]) -> None:
    module: Any = warnings
    module.filters, filters, module.showwarning = before
    module.resetwarnings()  # which also tells the module that its filters are others
    module.filters[:] = filters


def _loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(found for found in known if isinstance(found, logging.Logger))]


def _read_levels() -> tuple[list[logging.Logger], list[int], list[bool]]:
    loggers = _loggers()
    return loggers, [logger.level for logger in loggers], [logger.disabled for logger in loggers]


def _write_levels(before: tuple[list[logging.Logger], list[int], list[bool]]) -> None:
    for logger, level, disabled in zip(*before, strict=True):
        if logger.level != level:
            logger.setLevel(level)
        if logger.disabled != disabled:
            logger.disabled = disabled


def _write_environment(before: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@dataclass(frozen=True, slots=True)
class _Handlers:
    """Where the records of all loggers go, and whether the package of each one's name was imported then.

    A column each, as libraries have hundreds of loggers: an object for each would be thousands, each time that a check
    begins, for Python's garbage collector to walk over.
    """

    loggers: list[logging.Logger]
    handlers: list[list[Any]]
    filters: list[list[Any]]
    contents: list[tuple[tuple[Any, ...], tuple[Any, ...]]]
    propagates: list[bool]
    are_loaded: list[bool]

    @classmethod
    def now(cls) -> _Handlers:
        loggers = _loggers()
        handlers, filters = [one.handlers for one in loggers], [one.filters for one in loggers]
        nothing: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        held = zip(handlers, filters, strict=True)
        contents = [(tuple(h), tuple(f)) if h or f else nothing for h, f in held]
        loaded = [_package(one) in sys.modules for one in loggers]
        return cls(loggers, handlers, filters, contents, [one.propagate for one in loggers], loaded)

    def restore(self) -> None:
        columns = self.loggers, self.handlers, self.filters, self.contents, self.propagates, self.are_loaded
        for logger, handlers, filters, contents, propagates, is_loaded in zip(*columns, strict=True):
            # A library that is imported meanwhile sets its logger up, once.
            if not is_loaded and _package(logger) in sys.modules:
                continue
            logger.handlers, logger.filters, logger.propagate = handlers, filters, propagates
            for kept, before in zip((handlers, filters), contents, strict=True):
                if len(kept) != len(before) or tuple(kept) != before:
                    kept[:] = before


def _package(logger: logging.Logger) -> str:
    return "logging" if logger is logging.root else logger.name.partition(".")[0]


SETTINGS = (
    Setting("random states", RandomStates, RandomStates.restore, compared=False),
    Setting("float32 precision", Float32Precision, Float32Precision.restore, compared=False),
    Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("default device", _read_device, _write_device),
    Setting("autocast", _read_autocast, _write_autocast),
    Setting("deterministic algorithms", _read_deterministic, _write_deterministic),
    Setting(
        "anomaly detection",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda before: torch.autograd.set_detect_anomaly(*before),
    ),
    Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("warning filters", _read_filters, _write_filters),
    Setting("logging levels", _read_levels, _write_levels, compared=False),
    Setting("logging handlers", _Handlers.now, _Handlers.restore, compared=False),
    Setting("environment variables", os.environ.copy, _write_environment),
    Setting("garbage collection", collector.is_wanted, collector.want),
    Setting("disabled logging", lambda: logging.root.manager.disable, logging.disable),
)
"""What is kept of the process; tests attack each."""


class Process:
    """The random states and settings of this process as they are now.

    Args:
        generators: Random generators beside the global ones.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        own = (Setting(f"the generator {g}", g.get_state, _writer(g)) for g in generators)
        self._before = [(setting, setting.read()) for setting in (*SETTINGS, *own)]

    def restore(self) -> list[str]:
        """Put everything back; gives the names of what could not be."""
        lost = []
        for setting, before in self._before:
            try:
                if not setting.compared or not _same(setting.read(), before):
                    setting.write(before)
            except Exception:  # whatever a library raises, the others are put back all the same
                lost.append(setting.name)
        return lost


def _writer(generator: torch.Generator) -> Callable[[Tensor], None]:
    def write(state: Tensor) -> None:
        generator.set_state(state)

    return write


def _same(now: Any, before: Any) -> bool:
    return torch.equal(now, before) if isinstance(before, Tensor) else bool(now == before)
