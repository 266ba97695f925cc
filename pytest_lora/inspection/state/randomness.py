"""The random states of a process, taken and put back: Python's, NumPy's, torch's on the CPU and on accelerators."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

_cuda: Any = torch.cuda


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
