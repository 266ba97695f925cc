"""GPU tests: judged at set-up, given their share of the devices, measured, and cleaned up after.

:class:`GpuTests` is registered when a session has collected such a test; other sessions know nothing of it.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.plugin.gpu import devices, hardware, ledger, locks, memory
from pytest_lora.plugin.gpu.devices import Devices
from pytest_lora.plugin.gpu.last_words import LastWords
from pytest_lora.plugin.gpu.marks import need_of, need_of_fixtures
from pytest_lora.plugin.gpu.memory import Soundness
from pytest_lora.plugin.gpu.run import PREDICTION, Run, explained, out_of_memory, over_limit, predict
from pytest_lora.plugin.options import has_own, is_gpu_test
from pytest_lora.plugin.session_options import options_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_lora.plugin.gpu.memory import Memory

_RUN = pytest.StashKey[Run]()


def begin(config: pytest.Config, tests: list[pytest.Item]) -> None:
    """Take care of the GPU tests that were collected."""
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(config, "workerinput"):
        devices.pin_collected(config, max(_count(item) for item in tests))
    config.pluginmanager.register(GpuTests(config), "lora-gpu")


def _count(item: pytest.Item) -> int:
    try:
        return need_of(item).count
    except ValueError:  # reported in the set-up of the test
        return 1


class GpuTests:
    """The hooks around GPU tests, and what they know of the session."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._is_required = options_of(config).require_gpu
        self._devices = Devices(config)
        self._cached_memory: Memory | None = None
        self._current: Run | None = None
        self._lasting: dict[object, int] = {}
        self._is_nested = False
        self._left: dict[str, int] = {}
        self._cuda = Soundness()
        self._last_words = LastWords(config)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Wait for the devices around the whole test and all its tries, outside of its time limit."""
        is_asked = is_gpu_test(item)
        if not is_asked and not (has_own(item, "lora_device") and self._devices.hold_fixtures):
            return (yield)
        run = item.stash[_RUN] = Run(is_asked=is_asked)
        stack = ExitStack()
        try:
            try:
                self._prepare(item, run, stack)
            except Exception as error:  # raised in the test's set-up: here it would end the session
                run.problem = error
            self._current = run
            if run.devices:
                self._last_words.begin(item.nodeid)
            return (yield)
        finally:
            self._last_words.end()
            self._current = None
            locks.give_back(item, stack)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip or fail a test that cannot run; note what is allocated before one that can."""
        run = item.stash.get(_RUN, None)
        if run is None:
            return
        if isinstance(run.problem, ValueError | ledger.NotSharedError):
            pytest.fail(str(run.problem), pytrace=False)
        if run.problem is not None:
            raise run.problem
        if self._cuda.words:  # perhaps by an earlier try of this test
            run.broken_by = self._cuda.broken_by
            run.reason = (
                f"not run: CUDA is broken in this process since {self._cuda.broken_by} ({self._cuda.words})"
            )
            pytest.skip(run.reason)
        if run.reason and self._is_required:
            pytest.fail(f"--lora-require-gpu: {run.reason}", pytrace=False)
        if run.reason:
            pytest.skip(run.reason)
        self._start(run)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        """Note what fixtures allocate that outlive the test: it is not the test that leaves it."""
        if self._current is None or self._is_nested:
            return (yield)
        before = self._allocated(self._current)
        self._is_nested = fixturedef.scope != "function"
        try:
            value = yield
        finally:
            self._is_nested = False
        grown = self._allocated(self._current) - before
        if fixturedef.scope != "function":
            self._lasting[fixturedef] = grown
        elif id(value) in self._kept_adapters():
            self._lasting.setdefault(id(value), grown)
        return value

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """What a fixture held is free again."""
        self._lasting.pop(fixturedef, None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Fail a test that went over its limit, or broke CUDA without an error of its own."""
        run = item.stash.get(_RUN, None)
        if run is None:
            return (yield)
        was_broken = self._cuda.words
        try:
            result = yield
        finally:
            self._look(item, run)
        self._cuda.require(was_broken)
        limit = run.need.limit
        if limit and run.peak is not None and run.peak > limit.size:
            predict(item)
            prediction = item.stash.get(PREDICTION, None)
            breakdown = prediction.breakdown if prediction else {}
            message = over_limit(run.peak, limit, tuple(run.devices.values()), run.before, breakdown)
            pytest.fail(message, pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Free what the test held and note what it left; fail it if it broke CUDA and nothing has said so."""
        run = item.stash.get(_RUN, None)
        if run is None:
            return (yield)
        was_broken = self._cuda.words
        try:
            result = yield
        finally:
            self._clean_up(item, run)
        self._cuda.require(was_broken)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put the measurements on the report, and a diagnosis under an error of the GPU."""
        run = item.stash.get(_RUN, None)
        if run is None:
            return (yield)
        if call.when == "call":
            run.seconds = round(call.duration, 3)
            if options_of(self._config).gpu_report:
                predict(item)
        diagnosis = ""
        if call.excinfo:
            run.errors.append(call.excinfo.value)
            with suppress(Exception):  # of an error that is asked for its text, or of a broken device
                diagnosis = self._diagnosis(item, run, call.excinfo.value)
        run.publish(item)
        report = yield
        if diagnosis:
            report.sections.append(("GPU", diagnosis))
        return report

    def _prepare(self, item: pytest.Item, run: Run, stack: ExitStack) -> None:
        """Judge whether the test can run here, and if so hold its devices until the stack is closed.

        Raises:
            ValueError: A mark is wrong.
            NotSharedError: The devices did not become free.
        """
        run.need = need_of(item) if run.is_asked else need_of_fixtures(item)
        if self._cuda.words or item.get_closest_marker("skip"):
            return
        if lack := self._devices.obstacle(run.need):
            run.reason = lack if run.is_asked else ""
            return
        run.devices = self._devices.of(run.need)
        if hasattr(self._config, "workerinput"):
            totals = {self._devices.key(device): device.total for device in run.devices.values()}
            stack.enter_context(locks.held(dict.fromkeys(totals, run.need.share), totals, item.nodeid))
            stack.callback(self._keep, run)
        stack.enter_context(self._memory.peaks_kept())

    def _keep(self, run: Run) -> None:
        """Tell the other workers what this one holds until its next test: a base of session scope, say."""
        held = {number: self._allocated_on(number) for number in run.devices}
        shares = {
            self._devices.key(run.devices[n]): memory.CONTEXT + size for n, size in held.items() if size
        }
        locks.keep(shares, os.environ["PYTEST_XDIST_WORKER"])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """What ends with the session: a worker keeps nothing any more."""
        self._last_words.close()
        if hasattr(self._config, "workerinput"):
            with suppress(ledger.NotSharedError):
                locks.keep({}, "")

    @property
    def _memory(self) -> Memory:
        if self._cached_memory is None:
            replaced = self._config.stash.get(memory.MEMORY, None)
            kind = "cpu" if hardware.is_replaced() else self._devices.hardware.kind
            self._cached_memory = replaced or memory.of_kind(kind)
        return self._cached_memory

    def _allocated(self, run: Run) -> int:
        """Bytes allocated on the devices of a test; 0 once CUDA is broken."""
        return sum(map(self._allocated_on, run.devices))

    def _allocated_on(self, number: int) -> int:
        return 0 if self._cuda.words else self._memory.allocated(number)

    def _kept_adapters(self) -> set[int]:
        if "pytest_lora.plugin.shared_base" not in sys.modules:
            return set()
        from pytest_lora.plugin import shared_base

        return shared_base.of(self._config).kept_adapters()

    def _lasting_bytes(self) -> int:
        """What fixtures that outlive tests hold, and adapters that are kept for a later test."""
        kept = self._kept_adapters()
        return sum(size for key, size in self._lasting.items() if not isinstance(key, int) or key in kept)

    def _start(self, run: Run) -> None:
        run.before, run.lasting = self._allocated(run), self._lasting_bytes()
        run.peak = run.left = run.seconds = None
        for number in run.devices:
            self._memory.restart(number)

    def _look(self, item: pytest.Item, run: Run) -> None:
        """Note the peak so far."""
        if self._cuda.words or not run.devices:
            return
        try:
            self._memory.synchronize()
            peaks = [self._memory.peak(number) for number in run.devices]
        except RuntimeError as error:
            self._cuda.end(item.nodeid, error)
            return
        run.peak = max((peak for peak in peaks if peak is not None), default=None)

    def _clean_up(self, item: pytest.Item, run: Run) -> None:
        # pytest forgets the values of its fixtures right after this hook.
        getattr(item, "funcargs", {}).clear()
        memory.let_go(run.errors)
        if self._cuda.words or not run.devices:
            return
        try:
            self._memory.synchronize()
            self._memory.release()
            left = self._allocated(run) - self._lasting_bytes() - run.before + run.lasting
        except RuntimeError as error:
            self._cuda.end(item.nodeid, error)
            return
        run.left = max(left, 0)
        if run.left:
            self._left[item.nodeid] = run.left

    def _diagnosis(self, item: pytest.Item, run: Run, error: BaseException) -> str:
        """What to say under an error."""
        if self._cuda.note(item.nodeid, error):
            return (
                f"CUDA is broken in this process now ({self._cuda.words}). GPU tests that follow in it are not run: "
                "each would fail with the same error. CUDA_LAUNCH_BLOCKING=1 shows the line that broke it."
            )
        if self._cuda.words or not run.devices or not memory.is_out_of_memory(error):
            return ""
        self._look(item, run)
        taken = {number: self._memory.taken(number) for number in run.devices}
        seen = out_of_memory(run.devices, run.before, run.peak, taken, run.need.vram, self._left)
        smallest = min(device.total for device in run.devices.values())
        return "\n".join(filter(None, (seen, explained(item, smallest))))
