"""Memory of the GPUs as the allocator of torch counts it: read, freed, and what an error says of it and of CUDA."""

from __future__ import annotations

import gc
import re
import traceback
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Memory(Protocol):
    """Memory of the devices of one kind, by torch's numbers of them; sizes in bytes.

    Each method may raise what torch raises where the device is broken.
    """

    def synchronize(self) -> None:
        """Wait for the devices, so that their errors are raised here and not in the next test."""

    def allocated(self, ordinal: int) -> int:
        """What tensors of this process hold."""

    def peak(self, ordinal: int) -> int | None:
        """The most that was allocated at a time since :meth:`restart`; ``None`` where nobody counts."""

    def restart(self, ordinal: int) -> None:
        """Start to look for a new peak."""

    def peaks_kept(self) -> AbstractContextManager[None]:
        """Inside, a peak lasts until :meth:`restart`, whoever else resets torch's own: a sweep, a test, a library."""

    def taken(self, ordinal: int) -> int | None:
        """What is taken on the device by all processes; ``None`` if unknown."""

    def release(self) -> None:
        """Give cached memory back to the device."""


CONTEXT = 512 * 2**20
"""Bytes that a process takes of a device beside its tensors; CUDA's context takes 0.4 to 0.6 GiB."""

MEMORY = pytest.StashKey[Memory]()
"""In the stash of a configuration: replaces torch's numbers, for tests without a GPU."""

_RESETS = ("_cuda_resetPeakMemoryStats", "_xpu_resetPeakMemoryStats", "_accelerator_resetPeakStats")
"""The functions of ``torch._C`` under every function of torch that resets a peak; each takes a device's number."""


class CountingMemory:
    """CUDA, ROCm and XPU: their modules in torch have the same functions."""

    def __init__(self, kind: str) -> None:
        import torch

        self._kind = kind
        self._module: Any = getattr(torch, kind)
        self._module.init()
        self._erased: dict[int, int] = {}

    def synchronize(self) -> None:
        self._module.synchronize()

    def allocated(self, ordinal: int) -> int:
        return int(self._module.memory_allocated(ordinal))

    def peak(self, ordinal: int) -> int | None:
        return max(int(self._module.max_memory_allocated(ordinal)), self._erased.get(ordinal, 0))

    def restart(self, ordinal: int) -> None:
        self._module.reset_peak_memory_stats(ordinal)
        self._erased.pop(ordinal, None)

    @contextmanager
    def peaks_kept(self) -> Iterator[None]:
        import torch

        native: Any = torch._C
        before = {name: getattr(native, name) for name in _RESETS if hasattr(native, name)}
        for name, reset in before.items():
            setattr(native, name, partial(self._note_and, reset))
        try:
            yield
        finally:
            for name, reset in before.items():
                setattr(native, name, reset)

    def _note_and(self, reset: Any, ordinal: int) -> Any:
        self._erased[ordinal] = self.peak(ordinal) or 0
        return reset(ordinal)

    def taken(self, ordinal: int) -> int | None:
        free, total = self._module.mem_get_info(ordinal)
        return int(total - free)

    def release(self) -> None:
        import torch

        # cuBLAS takes its workspaces from the same allocator and keeps them: no test left those behind.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if self._kind == "cuda" and clear:
            clear()
        self._module.empty_cache()


class MpsMemory:
    """Apple's GPUs: torch knows what is allocated there, and no peak."""

    def __init__(self) -> None:
        import torch

        self._module: Any = torch.mps

    def synchronize(self) -> None:
        self._module.synchronize()

    def allocated(self, ordinal: int) -> int:
        return int(self._module.current_allocated_memory())

    def peak(self, ordinal: int) -> int | None:
        return None

    def restart(self, ordinal: int) -> None: ...

    def peaks_kept(self) -> AbstractContextManager[None]:
        return nullcontext()

    def taken(self, ordinal: int) -> int | None:
        return int(self._module.driver_allocated_memory())

    def release(self) -> None:
        self._module.empty_cache()


class NoMemory:
    """Nothing can be read."""

    def synchronize(self) -> None: ...

    def allocated(self, ordinal: int) -> int:
        return 0

    def peak(self, ordinal: int) -> int | None:
        return None

    def restart(self, ordinal: int) -> None: ...

    def peaks_kept(self) -> AbstractContextManager[None]:
        return nullcontext()

    def taken(self, ordinal: int) -> int | None:
        return None

    def release(self) -> None: ...


def of_kind(kind: str) -> Memory:
    """The memory of the devices of a kind; starts CUDA."""
    if kind == "mps":
        return MpsMemory()
    return CountingMemory(kind) if kind in ("cuda", "xpu") else NoMemory()


_POISON = re.compile(
    r"device-side assert|illegal memory access|illegal instruction|misaligned address|unspecified launch failure"
    r"|uncorrectable .{0,20}ECC|hardware (stack )?error|operation not supported on global/shared address space"
    r"|invalid (program counter|address space)|launch timed out|unknown error",
    re.IGNORECASE,
)

_OUT_OF_MEMORY = re.compile(
    r"(cuda|hip|xpu|mps|gpu)\b.{0,40}out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, those it came from, and those in its group."""
    pending, seen = [error], set[int]()
    while pending:
        one = pending.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        pending += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions


def poison(error: BaseException) -> str:
    """The words of an error after which CUDA answers nothing but errors in this process; empty for others.

    Only errors of torch and of what is below it count: those of a test that merely quotes the words do not.
    """
    for one in chain(error):
        text = str(one)
        if (
            isinstance(one, RuntimeError)
            and re.search(r"\b(CUDA|HIP)\b", text)
            and (match := _POISON.search(text))
        ):
            return match[0]
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU did not suffice."""
    return any(
        type(one).__name__ == "OutOfMemoryError"
        or (isinstance(one, RuntimeError) and _OUT_OF_MEMORY.search(str(one)))
        for one in chain(error)
    )


def let_go(errors: list[BaseException]) -> None:
    """Clear the frames of the tracebacks, whose local variables would keep tensors alive, and collect."""
    for error in errors:
        for one in chain(error):
            traceback.clear_frames(one.__traceback__)
            for frame, _ in traceback.walk_tb(one.__traceback__):
                # Before Python 3.13 a frame keeps what pytest once read of it, until it is read again.
                len(frame.f_locals)
    errors.clear()
    gc.collect()


class Soundness:
    """Whether CUDA still works in this process: after some errors it answers nothing but errors.

    Attributes:
        words: Of the error that broke CUDA; empty as long as it works.
        broken_by: The test in which that was.
    """

    def __init__(self) -> None:
        self.words = self.broken_by = ""

    def note(self, test: str, error: BaseException) -> bool:
        """Look at an error of a test; whether this test broke CUDA, by its words or as a look at the device found."""
        if poison(error):
            self.end(test, error)
        return self.broken_by == test

    def end(self, test: str, error: BaseException) -> None:
        """CUDA is broken: what a look at the device raises, whatever its words, is no error of the test alone."""
        if not self.words:
            self.words = poison(error) or str(error).partition("\n")[0] or type(error).__name__
            self.broken_by = test

    def require(self, before: str) -> None:
        """Fail a test that broke CUDA without an error of its own; ``before`` are the words before it."""
        if self.words and not before:
            pytest.fail(f"this test left CUDA broken: {self.words}", pytrace=False)
