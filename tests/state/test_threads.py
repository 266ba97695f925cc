"""Checks in several threads, and in a fork amid one: nothing is left as another had it, nobody waits for ever."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import check_checkpoint, check_config, check_merge, check_model, check_training
from pytest_lora.bases import examples
from pytest_lora.inspection.limited import limited
from pytest_lora.inspection.quiet import alone, collector, unexplained, warnings_only_warn
from tests.state.observed import amid_training, changed, observed

SECONDS = 120


def together(*calls: Callable[[], object]) -> None:
    """Run calls at once, in a thread each."""
    start = threading.Barrier(len(calls))
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            start.wait(SECONDS)
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_threads_take_turns_at_one_model_and_leave_the_process_as_it_was() -> None:
    setup = amid_training()
    adapter, config = examples.adapter(), LoraConfig(r=2, target_modules=["q_proj"])
    base, large = examples.base, examples.llama_7b
    classes = {(kind, name): vars(kind)[name] for kind in (nn.Module, nn.Linear) for name in vars(kind)}
    initial, filters, before = dict(vars(nn.init)), list(warnings.filters), observed(setup)
    training = lambda: check_training(setup.model, setup.batches.batch, steps=1)  # noqa: E731
    for _ in range(3):
        together(
            training,
            training,
            lambda: check_merge(setup.model, setup.batches.batch),
            lambda: check_model(setup.model),
            lambda: check_config(config, large),
            lambda: check_config(config, "Qwen/Qwen2.5-0.5B"),
            lambda: check_checkpoint(adapter, base),
        )
    assert changed(before, observed(setup)) == []
    assert {(kind, name): vars(kind)[name] for kind, name in classes} == classes
    assert dict(vars(nn.init)) == initial
    assert list(warnings.filters) == filters
    assert (
        not get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).unload().lm_head.weight.is_meta
    )


class Pause:
    """A pause of the garbage collector that another thread holds until it is ended."""

    def __init__(self) -> None:
        self._begun, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)
        self._thread.start()
        self._begun.wait(SECONDS)

    def _hold(self) -> None:
        with collector.paused():
            self._begun.set()
            self._over.wait(SECONDS)

    def end(self) -> None:
        self._over.set()
        self._thread.join(SECONDS)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_garbage_collector_runs_again_when_the_last_pause_ends(wanted: bool) -> None:
    before = gc.isenabled()
    (gc.enable if wanted else gc.disable)()
    try:
        with collector.paused():
            other = Pause()
        assert (gc.isenabled(), collector.is_wanted()) == (False, wanted)
        with collector.paused(), collector.paused():
            # As the keeper of a check does that ends amid a pause of another thread.
            collector.want(collector.is_wanted())
        assert not gc.isenabled()
        other.end()
        assert (gc.isenabled(), collector.is_wanted()) == (wanted, wanted)
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_knows_the_pauses_of_its_own_thread_alone() -> None:
    other = Pause()
    child = os.fork()
    if child == 0:
        with collector.paused():
            paused = not gc.isenabled()
        os._exit(7 if paused and gc.isenabled() else 1)
    other.end()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_amid_a_check_of_another_thread_goes_on() -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with alone, limited._lock:
            held.set()
            go.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(SECONDS)
    child = os.fork()
    if child == 0:
        with alone, limited._lock:
            os._exit(7)
    ends = time.monotonic() + SECONDS
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < ends:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(done[1]) == 7
    assert done[0] == child


def test_warnings_that_a_session_makes_errors_of_are_shown_and_what_it_hides_stays_hidden() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "hidden")
        with warnings_only_warn():
            for text, kind in (("told", UserWarning), ("hidden", UserWarning), ("later", FutureWarning)):
                warnings.warn(text, kind, stacklevel=1)
        with pytest.raises(UserWarning, match="told"):
            warnings.warn("told", UserWarning, stacklevel=1)
    assert [str(one.message) for one in shown] == ["told"]


@pytest.mark.parametrize("tool", ["scrutineer", "coverage", None])
def test_hypothesis_alone_notes_no_lines_meanwhile(monkeypatch: pytest.MonkeyPatch, tool: str | None) -> None:
    events = {2: 33}
    monitoring = SimpleNamespace(
        get_tool=lambda number: tool if number == 2 else None,
        get_events=events.__getitem__,
        set_events=events.__setitem__,
    )
    monkeypatch.setattr(sys, "monitoring", monitoring, raising=False)
    with unexplained():
        assert events[2] == (0 if tool == "scrutineer" else 33)
    assert events == {2: 33}
