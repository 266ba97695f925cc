"""Under pytest-xdist: each worker its GPU, shared without ever taking more of it than there is."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.plugin.gpu import devices, hardware, ledger, locks
from tests.forked import run_forked
from tests.plugin.sessions import example_command, run
from tests.plugin.simulated import CARD, GB, machine, shared

pytestmark = pytest.mark.lora_slow

SEES = """
import json, os, sys, time
from pathlib import Path
import pytest

def note(request):
    told = {"worker": os.environ.get("PYTEST_XDIST_WORKER"), "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "test": request.node.name}
    with open("seen.log", "a") as log:
        log.write(json.dumps(told) + "\\n")
    time.sleep(0.3)
"""

RECORD_AT_IMPORT = """
import os, sys
AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")
TORCH_AT_IMPORT = "torch" in sys.modules

def pytest_configure(config):
    with open(f"import-{os.environ.get('PYTEST_XDIST_WORKER')}.log", "w") as log:
        log.write(f"{AT_IMPORT} {TORCH_AT_IMPORT}")
"""


def seen(pytester: pytest.Pytester) -> dict[str, set[str | None]]:
    """What each worker's tests saw as CUDA_VISIBLE_DEVICES."""
    found: defaultdict[str, set[str | None]] = defaultdict(set)
    for line in (pytester.path / "seen.log").read_text().splitlines():
        told = json.loads(line)
        found[told["worker"]].add(told["visible"])
    return dict(found)


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def replay(log: list[dict[str, Any]], total: int) -> dict[str, int]:
    """The most tests at a time on each device; fails where they take more than there is."""
    taken: defaultdict[str, int] = defaultdict(int)
    tests: defaultdict[str, int] = defaultdict(int)
    most: defaultdict[str, int] = defaultdict(int)
    for event in log:
        sign = 1 if event["event"] == "hold" else -1
        for key, size in event["shares"].items():
            taken[key] += sign * size
            tests[key] += sign
            assert 0 <= taken[key] <= total, event
            most[key] = max(most[key], tests[key])
    assert not any(taken.values())
    return dict(most)


def test_each_worker_sees_one_of_the_callers_devices_before_anything_is_imported(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *[24] * 8)
    shared(monkeypatch, pytester.path)
    pytester.makeconftest(RECORD_AT_IMPORT)
    pytester.makepyfile(
        SEES
        + "@pytest.mark.lora_gpu\n@pytest.mark.parametrize('n', range(12))\ndef test_it(request, n): note(request)"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,7")
    result = pytester.runpytest_subprocess("-n", "4", "--lora-require-gpu", "--lora-gpu-report")
    result.assert_outcomes(passed=12)
    own = {"gw0": "5", "gw1": "3", "gw2": "7", "gw3": "5"}
    assert all(visible == {own[worker]} for worker, visible in seen(pytester).items())
    for worker, entry in own.items():
        assert (pytester.path / f"import-{worker}.log").read_text() == f"{entry} False"
    assert (pytester.path / "import-None.log").read_text() == "5,3,7 False"
    result.stdout.fnmatch_lines(["*test_it[[]*[]] * cuda:2 *"])


@pytest.mark.parametrize(
    ("args", "marks", "expected"),
    [
        ([], "lora_gpu", {"gw0": {"0"}, "gw1": {"1"}}),
        (["--lora-require-gpu"], "lora_gpu(count=3)", {"gw0": {"0,1,2"}, "gw1": {"1,2,3"}}),
        ([], "skipif(False, reason='')", {"gw0": {None}, "gw1": {None}}),
    ],
    ids=["late", "early count", "no GPU test"],
)
def test_how_many_devices_a_worker_sees(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    marks: str,
    expected: dict[str, set[str | None]],
) -> None:
    machine(monkeypatch, *[24] * 4)
    shared(monkeypatch, pytester.path)
    pytester.makepyfile(
        SEES
        + f"@pytest.mark.{marks}\n@pytest.mark.parametrize('n', range(4))\ndef test_it(request, n): note(request)"
    )
    pytester.runpytest_subprocess("-n", "2", *args).assert_outcomes(passed=4)
    assert seen(pytester) == expected


@pytest.mark.parametrize(
    ("args", "count", "at_start", "expected"),
    [
        ([], 1, None, "1"),
        ([], 2, None, "1,2"),
        (["-o", "lora_gpus_per_worker=2"], 1, "1,2", "1,2"),
        (["-o", "lora_gpus_per_worker=2"], 3, "1,2", "1,2"),
        (["--lora-gpu-report"], 3, "1", "1,2,3"),
        (["--lora-device", "cuda"], 1, "1", "1"),
        (["--lora-device", "cuda:3"], 1, "3", "3"),
        (["--lora-device", "cpu"], 1, None, None),
        (["--lora-device", "xpu"], 1, None, None),
    ],
)
def test_what_a_worker_is_pinned_to_at_its_start_and_after_collection(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    count: int,
    at_start: str | None,
    expected: str | None,
) -> None:
    machine(monkeypatch, *[24] * 4)
    monkeypatch.setenv(hardware.VISIBLE, "")  # so that it is put back to what it was
    monkeypatch.delenv(hardware.VISIBLE)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    config = pytester.parseconfig(*args)
    assert os.environ.get(hardware.VISIBLE) == at_start
    devices.pin_collected(config, count)
    assert os.environ.get(hardware.VISIBLE) == expected


def test_a_test_gets_as_many_devices_as_it_counts(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *[24] * 4)
    log = shared(monkeypatch, pytester.path)
    pytester.makepyfile(
        "import pytest\n@pytest.mark.lora_gpu(count=2)\n@pytest.mark.parametrize('n', range(6))\ndef test_two(n): ...\n"
        "@pytest.mark.lora_gpu(count=5)\ndef test_five(): ..."
    )
    result = pytester.runpytest_subprocess("-n", "2", "-rs", "--lora-gpu-report")
    result.assert_outcomes(passed=6, skipped=1)
    assert all(len(event["shares"]) == 2 for event in events(log))
    replay(events(log), 24 * GB)
    result.stdout.fnmatch_lines(["SKIPPED * needs 5 devices; there are 4: cuda:*"])
    result.stdout.fnmatch_lines(["*::test_two[[]*[]] * cuda:*, cuda:* *"])


def test_too_narrow_a_worker_says_what_to_set(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *[24] * 4)
    shared(monkeypatch, pytester.path)
    pytester.makeini("[pytest]\nlora_gpus_per_worker = 1")
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu(count=2)\ndef test_it(): ...")
    result = pytester.runpytest_subprocess("-n", "1", "-rs")
    result.stdout.fnmatch_lines(
        ["SKIPPED * needs 2 devices; there is 1: cuda:0 of 4: set ini lora_gpus_per_worker = 2"]
    )
    result = run(pytester, "-o", "lora_gpus_per_worker=two")
    result.stderr.fnmatch_lines(["ERROR: ini lora_gpus_per_worker: 'two' is no number of GPUs"])


STARTED = """
import os

def pytest_configure(config):
    "Stands for a CUDA that was started before: it shows what it saw then."
    if hasattr(config, "workerinput"):
        os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,2,3"
"""


def test_a_worker_that_could_not_be_pinned_runs_no_gpu_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *[24] * 4)
    shared(monkeypatch, pytester.path)
    pytester.makeconftest(STARTED)
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu\ndef test_it(): ...")
    result = pytester.runpytest_subprocess("-n", "1", "--lora-require-gpu")
    result.assert_outcomes(errors=1)
    assert (
        "--lora-require-gpu: needs a worker that sees 1 of the GPUs, and this one sees 4: CUDA was started before it "
        "could be pinned; ini lora_gpus_per_worker = 1 pins workers before anything is imported"
    ) in result.outlines


SUITE = """
import json, os, time
import pytest

SIZES = [16, 8, 12, None, 6]

def note(event, request):
    visible = os.environ["CUDA_VISIBLE_DEVICES"]
    with open("bodies.log", "a") as log:
        log.write(json.dumps([event, time.monotonic(), request.node.name, visible]) + "\\n")

def work(request):
    note("start", request)
    time.sleep(0.05)
    note("end", request)

def sizes():
    for n in range(45):
        yield pytest.param(SIZES[n % 5], marks=pytest.mark.lora_gpu(min_vram_gb=SIZES[n % 5]), id=f"{n}-{SIZES[n % 5]}")

@pytest.mark.parametrize("size", sizes())
def test_one(size, request): work(request)

@pytest.mark.lora_gpu(count=2, min_vram_gb=16)
@pytest.mark.parametrize("n", range(5))
def test_two(n, request): work(request)
"""


def test_fifty_tests_of_eight_workers_never_take_more_than_four_devices_have(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *[24] * 4)
    log = shared(monkeypatch, pytester.path)
    pytester.makepyfile(SUITE)
    result = run_forked(pytester, "-n", "8", "--lora-require-gpu")
    result.assert_outcomes(passed=50)
    held = events(log)
    assert sum(event["event"] == "hold" for event in held) == 50
    assert sum(len(event["shares"]) for event in held if event["event"] == "hold") == 45 + 2 * 5
    most = replay(held, 24 * GB)
    assert set(most) == {"cuda:0", "cuda:1", "cuda:2", "cuda:3"}
    assert max(most.values()) > 1, "nothing was ever shared, so nothing was shown"
    running: defaultdict[str, int] = defaultdict(int)
    bodies = sorted(
        map(json.loads, (pytester.path / "bodies.log").read_text().splitlines()), key=lambda e: e[1]
    )
    for event, _, test, visible in bodies:
        size = (
            16
            if test.startswith("test_two")
            else int(test.rpartition("-")[2].strip("]").replace("None", "24"))
        )
        for entry in visible.split(",")[: 2 if test.startswith("test_two") else 1]:
            running[entry] += size if event == "start" else -size
            assert running[entry] <= 24, test


def test_a_failing_test_lets_its_devices_go(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    log = shared(monkeypatch, pytester.path)
    pytester.makepyfile(
        "import os, pytest\npytestmark = pytest.mark.lora_gpu\ndef test_fails(): assert 0\n"
        "@pytest.fixture\ndef broken(): assert 0\ndef test_error(broken): ...\n"
        "def test_dies(): os._exit(1)\ndef test_passes(): ..."
    )
    result = run_forked(pytester, "-n", "2")
    result.assert_outcomes(failed=2, errors=1, passed=1)
    assert max(replay(events(log), 24 * GB).values()) == 1


def test_workers_that_keep_a_base_take_turns_on_a_card_that_holds_one(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    shared(monkeypatch, pytester.path)
    pytester.makeconftest(CARD)
    pytester.makepyfile(
        SEES
        + """
@pytest.fixture(scope="session")
def base(card): return card.take(14 * 10**9)

@pytest.mark.lora_gpu(min_vram_gb=16)
@pytest.mark.parametrize("n", range(12))
def test_it(request, base, n): note(request)
"""
    )
    result = run_forked(pytester, "-n", "4", "--lora-require-gpu")
    result.assert_outcomes(passed=12)
    told = [json.loads(line)["worker"] for line in (pytester.path / "seen.log").read_text().splitlines()]
    assert len(set(told)) > 1, "one worker did all, so nothing was shown"
    turns = [worker for worker, _ in itertools.groupby(told)]
    assert len(turns) == len(set(turns)), turns


def test_the_example_workflow_runs_on_one_card_of_24_gb_with_a_7b(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker has a base of 14 GB in session scope; the tests say what they need, or nothing."""
    shared(monkeypatch, pytester.path)
    machine(monkeypatch, 24)
    pytester.makeini("[pytest]\nmarkers =")
    pytester.makeconftest(CARD)
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="session")
        def base(card): return card.take(14 * 10**9)

        @pytest.mark.lora_gpu(min_vram_gb=16)
        @pytest.mark.parametrize("n", range(8))
        def test_with_the_base(base, card, n): card.take(2 * 10**9)

        @pytest.mark.lora_vram_limit("20GiB")
        @pytest.mark.lora_slow
        def test_limited(base, card): card.take(10**9)

        @pytest.mark.lora_gpu
        def test_undeclared(card): ...

        def test_of_the_cpu_job(): raise AssertionError
        """
    )
    result = run_forked(pytester, *example_command())
    result.assert_outcomes(passed=10)
    kept: defaultdict[str, int] = defaultdict(int)
    for event in events(pytester.path / "holds.log"):
        kept[event["event"]] += 1
    assert kept == {"hold": 10, "release": 10}


HOLD = """
import sys, time
from pytest_lora.plugin.gpu import locks
with locks.held({"cuda:0": 10}, {"cuda:0": 10}, "the other process"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_dead_process_held_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = shared(monkeypatch, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(ledger.NotSharedError, match=r"^waited 0 s for cuda:0, held by the other process$"),
        locks.held({"cuda:0": 1}, {"cuda:0": 10}, "this", patience=0.2),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with locks.held({"cuda:0": 10}, {"cuda:0": 10}, "this", patience=5):
        pass
    assert [(event["event"], event["who"]) for event in events(log)] == [
        ("hold", "the other process"),
        ("release", "the other process"),
        ("hold", "this"),
        ("release", "this"),
    ]
    assert {path.name for path in ledger.folder().iterdir()} <= {"ledger.json", "ledger.lock"}


def test_more_than_there_is_counts_as_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = shared(monkeypatch, tmp_path)
    with locks.held({"cuda:0": 16}, {"cuda:0": 15}, "a T4", patience=1):
        pass
    assert events(log)[0]["shares"] == {"cuda:0": 15}


def test_no_worker_is_pinned_in_the_session_that_a_test_of_a_worker_starts(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24, 24)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    pytester.makepyfile(SEES + "@pytest.mark.lora_gpu(count=2)\ndef test_it(request): note(request)")
    for visible in (None, "1,0"):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        run(pytester, "--lora-require-gpu").assert_outcomes(passed=1)
        assert visible in seen(pytester)["gw1"]


def test_waiting_is_not_counted_as_the_tests_time(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    shared(monkeypatch, pytester.path)
    pytester.makepyfile(
        "import time, pytest\npytestmark = pytest.mark.lora_gpu\n"
        "@pytest.mark.parametrize('n', range(2))\ndef test_it(n): time.sleep(0.5)"
    )
    started = time.monotonic()
    result = run_forked(pytester, "-n", "2", "--lora-gpu-report")
    result.assert_outcomes(passed=2)
    assert time.monotonic() - started > 1.0
    rows = [line.split() for line in result.outlines if "::test_it[" in line]
    assert all(0.4 < float(row[-1]) < 0.9 for row in rows if row[1] == "cuda:0")
