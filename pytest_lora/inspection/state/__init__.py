"""The keeper: everything that a check could change, taken before it and put back after it.

One context leaves everything as it was, or says by name what it could not put back.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from types import CodeType, FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from pytest_lora.findings import grouped
from pytest_lora.inspection.quiet import alone
from pytest_lora.inspection.state.damage import Damage
from pytest_lora.inspection.state.process import SETTINGS, Process, cuda_in_use
from pytest_lora.inspection.state.snapshot import Snapshot
from pytest_lora.inspection.survey import every_module

__all__ = ["KEPT", "Damage", "Keeper", "NotRestoredError", "Snapshot", "cuda_in_use", "leaves_no_trace"]

P = ParamSpec("P")
R = TypeVar("R")

KEPT = (
    *("weights", "buffers", "gradients", "requires_grad", "quantization states", "tensor hooks"),
    *("modes", "attributes of modules", "classes of modules", "configurations", "module hooks"),
    *("optimizer", "scheduler", "scaler", "generators", "batches"),
    *(setting.name for setting in SETTINGS),
    "signal handlers",
)
"""The list: what a keeper leaves as it was. A test attacks each entry."""


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


class NotRestoredError(RuntimeError):
    """Something was changed that could not be put back."""


class Keeper:
    """Everything done inside is undone at the end, also after an error, a Ctrl-C or an exit.

    What is kept is listed in ``KEPT``. Of optimizers, schedulers, scalers and the like it is all that they hold, and of
    hooks what they train. Signals that come while all this is taken or put back wait until it is done.

    Threads are let in one after another.

    Without a model it costs a fraction of a millisecond. Models of up to 256 MiB are copied; of larger ones what
    training changes is, and a changed frozen weight is reported.

    Args:
        model: The model.
        others: What trains it; None is passed over.
        generators: Random generators beside the global ones.
        values: Whether contents of the model's tensors are kept, which a check that runs it needs.

    Raises:
        ValueError: On entry, where the model has tensors that could not be put back; the message names them.
        NotRestoredError: At the end, where something could not be; a note on the error that ended the context, if
            one did.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *others: object,
        generators: Iterable[torch.Generator] = (),
        values: bool = True,
    ) -> None:
        self._model = model
        self._others = others
        self._generators = tuple(generators)
        self._values = values
        self._interrupts = Interrupts(Keeper.__enter__.__code__, Keeper.__exit__.__code__)
        self._snapshots: list[Snapshot] = []
        self._process: Process | None = None
        self._is_alone = False

    def __enter__(self) -> Keeper:
        try:
            self._interrupts.hold()
            alone.__enter__()
            self._is_alone = True
            self._process = Process(self._generators)
            if self._model is not None:
                snapshot = Snapshot(self._model, *self._others, to_train=True, values=self._values)
                _require_kept(snapshot)
                self._snapshots.append(snapshot)
            self._interrupts.deliver(sys._getframe(1))
        except BaseException:
            self._let_others_in()
            self._interrupts.release()
            self._interrupts.deliver(sys._getframe(1))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            lost = [name for snapshot in reversed(self._snapshots) for name in snapshot.restore_all()]
            lost += self._process.restore() if self._process else []
        finally:
            self._let_others_in()
            self._interrupts.release()
            self._snapshots.clear()
        try:
            if lost:
                _report(lost, error)
        finally:
            self._interrupts.deliver(sys._getframe(1))

    def _let_others_in(self) -> None:
        if self._is_alone:
            self._is_alone = False
            alone.__exit__()

    def keep(self, *others: object) -> None:
        """Keep something more from now on, such as batches that came out of an iterator."""
        self._snapshots.append(Snapshot(None, *others))

    def before(self, tensor: Tensor) -> Tensor | None:
        """The values that a tensor had, in CPU memory; None if they were not copied."""
        found = (snapshot.before(tensor) for snapshot in self._snapshots)
        return next((values for values in found if values is not None), None)

    def clear_gradients(self) -> None:
        """Take all gradients away until the end, so that none is added to or overwritten."""
        for snapshot in self._snapshots:
            snapshot.clear_gradients()


def _require_kept(snapshot: Snapshot) -> None:
    for name, why in snapshot.opaque.items():
        raise ValueError(
            f"model: {name} is {why}, which could not be put back afterwards; make it a dense tensor first"
        )


def _report(lost: list[str], error: BaseException | None) -> None:
    names = grouped(tuple(dict.fromkeys(lost)))
    said = f"these changed and could not be put back: {names}; load the model anew"
    if error is None:
        raise NotRestoredError(said)
    error.add_note(said)


def leaves_no_trace(check: Callable[P, R]) -> Callable[P, R]:
    """For a function that only looks: keeps the random states and settings of the process.

    To read a parametrized weight is to compute it, for which a spectral norm goes on with its iteration: the state of
    such parts is kept too.
    """

    @wraps(check)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        models = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        parts = [part for m in models for part in every_module(m) if isinstance(part, ParametrizationList)]
        with Keeper(nn.ModuleList(parts) if parts else None):
            return check(*args, **kwargs)

    return kept
