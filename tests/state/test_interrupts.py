"""A Ctrl-C leaves no trace at whatever moment it comes, and is not lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_lora.inspection import state
from pytest_lora.inspection.state import Interrupts, Keeper, Snapshot
from tests.forked import outcome
from tests.state.observed import Setup, amid_training, changed, observed

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that sends a signal"),
]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where whoever started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def setup() -> Setup:
    torch.manual_seed(0)
    return amid_training()


INTERRUPTED = """
import warnings
import torch
from benchmarks import interrupts
from tests.state.observed import amid_training

warnings.simplefilter("ignore")
torch.manual_seed(0)
setup = amid_training()
found = interrupts.outcomes(interrupts.checks(setup)[check], setup, times, seed=1)
print([outcome for outcome in found if outcome.left])
print(sum(outcome.interrupted for outcome in found))
"""


@pytest.mark.parametrize(("check", "times"), [("check_training", 20), ("check_merge", 5)])
def test_interrupts_at_random_moments_leave_no_trace(check: str, times: int) -> None:
    """In a process of its own: an interrupt amid a lock of the standard library leaves that lock taken."""
    done = outcome(lambda: exec(INTERRUPTED, {"check": check, "times": times}), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    left, interrupted = done.stdout.splitlines()[-2:]
    assert left == "[]"
    assert int(interrupted) >= times // 2


@pytest.mark.parametrize("when", ["taken", "put back"])
def test_a_signal_waits_until_the_state_is_taken_or_put_back(
    setup: Setup, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the middle of the work, which goes on, and it is raised when that is done."""
    done: list[str] = []

    class Interrupted(Snapshot):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if when == "taken":
                os.kill(os.getpid(), signal.SIGINT)
            super().__init__(*args, **kwargs)
            done.append("taken")

        def restore_all(self) -> list[str]:
            if when == "put back":
                os.kill(os.getpid(), signal.SIGINT)
            lost = super().restore_all()
            done.append("put back")
            return lost

    monkeypatch.setattr(state, "Snapshot", Interrupted)
    before = observed(setup)
    with pytest.raises(KeyboardInterrupt), Keeper(setup.model):
        setup.model.eval()
    # What was only taken was not touched yet.
    assert done == (["taken"] if when == "taken" else ["taken", "put back"])
    assert changed(before, observed(setup)) == []


def test_a_signal_inside_is_delivered_at_once() -> None:
    reached = []

    def run() -> None:
        with Keeper():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the signal")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not reached


def test_every_signal_that_waits_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    monkeypatch.setattr(Snapshot, "restore_all", lambda self: [os.kill(os.getpid(), s) for s in two] and [])
    two = (signal.SIGUSR1, signal.SIGUSR2)
    previous = [signal.signal(number, lambda n, _: noted.append(n)) for number in two]
    try:
        with Keeper(nn.Linear(1, 1)):
            pass
    finally:
        for number, handler in zip(two, previous, strict=True):
            signal.signal(number, handler)
    assert sorted(noted) == sorted(two)


def test_one_keeper_within_another_delivers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    restore, after = Snapshot.restore_all, []

    def interrupted(self: Snapshot) -> list[str]:
        if not after:
            after.append("interrupted")
            os.kill(os.getpid(), signal.SIGINT)
        return restore(self)

    monkeypatch.setattr(Snapshot, "restore_all", interrupted)
    layer = nn.Linear(1, 1)

    def run() -> None:
        with Keeper(layer):
            with Keeper(layer):
                pass
            after.append("went on")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert after == ["interrupted"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_holds_no_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def run() -> None:
        with Keeper(nn.Linear(1, 1)):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_handler_that_raises_while_handlers_come_back_stops_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {number: signal.getsignal(number) for number in signal.Signals}
    held = Interrupts()
    held.hold()
    put, calls = signal.signal, []

    def interrupted(number: int, handler: Any) -> Any:
        found = put(number, handler)
        calls.append(number)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", interrupted)
        held.release()
    assert {number: signal.getsignal(number) for number in signal.Signals} == before
    with pytest.raises(KeyboardInterrupt):
        held.deliver(None)


def test_a_signal_while_handlers_are_taken_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not held yet raises at once."""
    before = {number: signal.getsignal(number) for number in signal.Signals}
    put, calls = signal.signal, []

    def interrupted(number: int, handler: Any) -> Any:
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(number, handler)

    previous = put(signal.SIGUSR1, lambda *_: None)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", interrupted)
            with pytest.raises(KeyboardInterrupt):
                Keeper().__enter__()
        put(signal.SIGUSR1, previous)
        assert {number: signal.getsignal(number) for number in signal.Signals} == before
    finally:
        put(signal.SIGUSR1, previous)
    assert len(calls) > 2
