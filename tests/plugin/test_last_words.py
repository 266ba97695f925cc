"""A session that a test ends below Python says which test it was, and why that happens."""

from __future__ import annotations

import os
import time

import pytest

from tests.plugin.sessions import run
from tests.plugin.simulated import machine, shared

ENDS = {
    "os._exit": "os._exit(1)",
    "exit of C": "ctypes.CDLL(None).exit(1)",
    "a signal": "os.kill(os.getpid(), 9)",
    "a crash": "os.abort()",
}
FIRST_LINE = "pytest-lora: this process ended in the middle of {}, without an exception."


def said(pytester: pytest.Pytester, wanted: str) -> bool:
    """Whether a line comes on the session's stderr, which may be a moment after its end."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if wanted in (pytester.path / "stderr").read_text().splitlines():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("way", ENDS)
def test_a_session_that_ends_in_a_test_names_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(
        test_it=f"""
        import ctypes, os, pytest

        @pytest.mark.lora_gpu
        def test_before(): ...

        @pytest.mark.lora_gpu
        def test_é(): {ENDS[way]}
        """
    )
    result = pytester.runpytest_subprocess()
    assert result.ret != 0
    assert said(pytester, FIRST_LINE.format("test_it.py::test_\\\\xe9".replace("\\\\", "\\")))


@pytest.mark.lora_slow
def test_a_worker_that_ends_in_a_test_names_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    shared(monkeypatch, pytester.path)
    pytester.makepyfile(
        test_it="import os, pytest\n@pytest.mark.lora_gpu\ndef test_ends(): os._exit(1)\n"
        "@pytest.mark.lora_gpu\ndef test_goes_on(): ..."
    )
    result = pytester.runpytest_subprocess("-n", "1")
    result.assert_outcomes(failed=1, passed=1)
    assert said(pytester, FIRST_LINE.format("test_it.py::test_ends"))


def test_nothing_is_said_where_nothing_ended(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(
        "import os, pytest, sys\n@pytest.mark.lora_gpu\ndef test_fails(): assert 0\n"
        "@pytest.mark.lora_gpu\ndef test_leaves(): sys.exit(3)\ndef test_plain(): os._exit(1)"
    )
    result = pytester.runpytest_subprocess()
    assert result.ret == 1
    time.sleep(1)
    assert "pytest-lora:" not in (pytester.path / "stderr").read_text()


def test_a_session_without_gpu_tests_starts_no_process(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    monkeypatch.setattr("subprocess.Popen", None)
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu\ndef test_it(): ...\ndef test_plain(): ...")
    run(pytester).assert_outcomes(passed=1, skipped=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_child_that_outlives_its_test_does_not_hold_the_session(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makepyfile(
        "import os, pytest, time\n@pytest.mark.lora_gpu\ndef test_forks():\n"
        "    if not os.fork():\n        time.sleep(60)\n        os._exit(0)"
    )
    before = time.monotonic()
    assert pytester.runpytest_subprocess("-s", timeout=40).ret == 0
    assert time.monotonic() - before < 40
