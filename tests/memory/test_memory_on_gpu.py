"""The benchmark of real GPUs, with CUDA played: whatever its processes do, a row comes of each and none is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.forked import begin_anew, fork
from tests.simulated_cuda import MACHINES, play

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_on_gpu.py"
ROW = {"setting": "good", "gpu": "NVIDIA L4", "predicted": {"allocated": 2**30}, "ratio": {"allocated": 1.01}}
CHILDREN = {
    "good": f"print('noise'); print({json.dumps(json.dumps(ROW))})",
    "silent death": "import os; os._exit(1)",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "nothing said": "pass",
    "noise only": "print('no JSON')",
    "raises": "raise ValueError('its own words')",
    "hangs": "import time; print('started', flush=True); time.sleep(600)",
}
ERRORS = {
    "good": None,
    "silent death": "its process ended with 1: without a word",
    "killed": "its process ended with -9: without a word",
    "nothing said": "its process ended with 0: without a word",
    "noise only": "its process ended with 0: without a word",
    "raises": "its process ended with 1: ValueError: its own words",
    "hangs": "took longer than 3 s",
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_on_gpu", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "memory_on_gpu", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


def with_children(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTINGS", tuple(map(Named, CHILDREN)))
    monkeypatch.setattr(module, "command", lambda setting: [sys.executable, "-c", CHILDREN[setting.name]])


def test_each_process_gives_a_row_whatever_becomes_of_it(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_children(benchmark, monkeypatch)
    lengths: list[int] = []
    real = benchmark.write

    def counted(path: Path, rows: list[dict[str, Any]]) -> None:
        real(path, rows)
        lengths.append(len(json.loads(path.read_text())["rows"]))

    monkeypatch.setattr(benchmark, "write", counted)
    benchmark.main(["--json", str(tmp_path / "out.json"), "--limit", "3"])
    assert lengths == list(range(1, len(CHILDREN) + 1))
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["gpu"] == "NVIDIA L4"
    assert {row["setting"]: row.get("error") for row in result["rows"]} == ERRORS
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["good", "1.00", "GiB", "allocated", "1.010"]
    assert len(lines) == len(CHILDREN)


def test_what_is_left_when_the_time_is_over_is_named(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_children(benchmark, monkeypatch)
    benchmark.main(["--json", str(tmp_path / "out.json"), "--total", "0", "--only", "good", "hangs"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["error"] for row in rows] == ["not run: no time is left"] * 2


KILLED = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import memory_on_gpu as benchmark
from tests.memory.test_memory_on_gpu import CHILDREN, Named
benchmark.SETTINGS = (Named("good"), Named("hangs"))
benchmark.command = lambda setting: [sys.executable, "-c", CHILDREN[setting.name].replace("600", "2")]
benchmark.main(["--json", out])
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_kill_loses_no_row_that_was_there(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out.json"
    reading, writing = os.pipe()

    def runs() -> int:
        os.dup2(writing, 1)
        begin_anew()
        exec(KILLED, {"out": str(out)})
        return 0

    pid = fork(runs)
    os.close(writing)
    with os.fdopen(reading) as told:
        assert told.readline().startswith("good ")
    while not out.exists():
        time.sleep(0.01)
    os.kill(pid, how)
    os.waitpid(pid, 0)
    first, *after = json.loads(out.read_text())["rows"]
    assert first == ROW
    # The signal may have come when the next child was over.
    assert [row["setting"] for row in after] in ([], ["hangs"])


@pytest.mark.parametrize("name", ["H200", "L4"])
@pytest.mark.parametrize("packed", [None, "nf4+dq"])
def test_a_setting_is_predicted_and_measured(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, name: str, packed: str | None
) -> None:
    small = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=1100
    )
    monkeypatch.setitem(benchmark.BASES, "small", lambda: small)
    setting = benchmark.Setting("small", 2, 16, packed=packed, checkpointing=packed is not None, padded=True)
    played = play(monkeypatch, MACHINES[name])
    monkeypatch.setattr(benchmark, "place", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        benchmark, "of_device", lambda device: benchmark.DeviceAnswers(played.machine.workspace, "flash")
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: MACHINES[name].name)
    monkeypatch.setattr(torch, "autocast", lambda *kind, **named: nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**24)
    played.take(2**23)
    row = benchmark.one(setting)
    assert row["gpu"] == MACHINES[name].name
    assert row["workspace"] == MACHINES[name].workspace
    assert row["measured"] == {"allocated": 2**23, "reserved": 2**24, "after_step": 2**23}
    assert row["ratio"]["allocated"] == row["predicted"]["allocated"] / 2**23
    assert row["predicted"]["allocated"] > 2 * MACHINES[name].workspace
