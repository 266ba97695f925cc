"""What docs/gpu_ci.md promises of sessions, on a real CUDA device. Run with --lora-require-gpu."""

from __future__ import annotations

import json

import pytest
import torch

from tests.plugin.sessions import example_command
from tests.plugin.simulated import GB
from tests.plugin.test_gpu_memory import section
from tests.plugin.test_last_words import FIRST_LINE, said

pytestmark = pytest.mark.lora_gpu(min_vram_gb=4)


def test_a_required_session_fails_for_what_it_lacks(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_lacks="import pytest\n@pytest.mark.lora_gpu(min_vram_gb=100000)\ndef test_it(): ...",
        test_none="def test_plain(): ...",
        test_runs="import pytest\n@pytest.mark.lora_gpu\ndef test_it(): ...",
    )
    assert pytester.runpytest_subprocess("test_lacks.py").ret == 0
    result = pytester.runpytest_subprocess("test_lacks.py", "--lora-require-gpu")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["--lora-require-gpu: needs 100000 GB on one device; cuda:0 has * GB"])
    assert pytester.runpytest_subprocess("test_none.py", "--lora-require-gpu").ret == 1
    assert pytester.runpytest_subprocess("test_runs.py", "--lora-require-gpu").ret == 0


def test_a_hidden_gpu_is_no_gpu(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu\ndef test_it(): ...")
    pytester.runpytest_subprocess().assert_outcomes(skipped=1)
    assert pytester.runpytest_subprocess("--lora-require-gpu").ret == 1


def test_a_card_is_as_large_as_it_was_sold(pytester: pytest.Pytester) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / GB
    pytester.makepyfile(
        "import pytest\n"
        f"@pytest.mark.lora_gpu(min_vram_gb={total * 1.02})\ndef test_what_the_driver_keeps(): ...\n"
        f"@pytest.mark.lora_gpu(min_vram_gb={total * 1.05})\ndef test_more(): ..."
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1, skipped=1)


def test_the_report_goes_to_the_summary_of_the_job(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    pytester.makepyfile(
        test_it="import pytest, torch\n@pytest.mark.lora_vram_limit('1GiB')\n"
        "def test_measured(): torch.zeros(2**20, device='cuda')"
    )
    result = pytester.runpytest_subprocess("--lora-gpu-report")
    (row,) = [line for line in section(result.outlines, "GPU tests") if "::" in line]
    assert "4.0 MiB" in row
    assert "test_measured" in summary.read_text()


def test_the_base_is_built_once_and_tensors_are_on_the_device_of_the_fixtures(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.lora_gpu
        SEEN = set()

        @pytest.mark.parametrize("n", range(3))
        def test_it(n, lora_base_model, lora_model, lora_batch, lora_device):
            SEEN.add(id(lora_base_model))
            assert len(SEEN) == 1
            assert next(lora_model.parameters()).device == lora_device
            assert lora_batch["input_ids"].device == lora_device
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=3)


def test_a_peak_lasts_whoever_resets_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.lora_vram_limit("32MiB")
        def test_over():
            torch.zeros(64 * 2**20, dtype=torch.uint8, device="cuda")
            torch.cuda.reset_peak_memory_stats()
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    (line,) = section(result.outlines, "test_over")
    assert line.startswith("peak memory of 64.0 MiB on cuda:0 is over the limit of 32.0 MiB")


def test_a_test_whose_fixtures_are_on_the_gpu_is_measured_without_asking(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="def test_unmarked(lora_model, lora_batch): lora_model(**lora_batch).loss.backward()"
    )
    result = pytester.runpytest_subprocess("--lora-gpu-report")
    result.assert_outcomes(passed=1)
    assert any(line.split()[:2] == ["test_it.py::test_unmarked", "cuda:0"] for line in result.outlines)


@pytest.mark.parametrize(
    "ends",
    [
        "os._exit(1)",
        # bitsandbytes launches a kernel on a context that is broken, and ends the process
        "torch.zeros(3, device='cuda')[torch.tensor([7], device='cuda')]\n"
        "    import bitsandbytes as bnb\n    bnb.functional.quantize_4bit(torch.ones(64, 64, device='cuda'))\n"
        "    os._exit(1)",
    ],
    ids=["by itself", "by bitsandbytes"],
)
def test_a_session_that_ends_in_a_test_names_it(pytester: pytest.Pytester, ends: str) -> None:
    pytester.makepyfile(
        test_it=f"import os, pytest, torch\n@pytest.mark.lora_gpu\ndef test_ends():\n  try:\n    {ends}\n"
        "  except RuntimeError:\n    os._exit(1)"
    )
    assert pytester.runpytest_subprocess().ret != 0
    assert said(pytester, FIRST_LINE.format("test_it.py::test_ends"))


def test_a_required_session_fails_where_cuda_broke(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        pytestmark = pytest.mark.lora_gpu

        @pytest.mark.xfail
        def test_breaks():
            torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]
            torch.cuda.synchronize()

        def test_next(): torch.ones(2, device="cuda").sum().item()
        """
    )
    result = pytester.runpytest_subprocess("--lora-require-gpu")
    result.assert_outcomes(xfailed=1, skipped=1)
    assert result.ret == 1


def test_a_test_that_ran_out_of_memory_may_be_run_again(pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_rerunfailures")
    pytester.makepyfile(
        """
        import pytest, torch

        TRIES = []

        @pytest.mark.lora_gpu
        def test_it():
            TRIES.append(1)
            if len(TRIES) == 1:
                torch.empty(2**44, dtype=torch.uint8, device="cuda")
        """
    )
    result = pytester.runpytest_subprocess("--reruns", "1", "--only-rerun", "OutOfMemoryError")
    assert result.parseoutcomes() == {"passed": 1, "rerun": 1}


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_can_be_chosen(pytester: pytest.Pytester, device: str) -> None:
    pytester.makepyfile(
        "import pytest, torch\n@pytest.mark.lora_gpu\ndef test_it(lora_device):\n"
        "    assert lora_device == torch.device('cuda', 0) == torch.ones(1, device=lora_device).device"
    )
    pytester.runpytest_subprocess("--lora-device", device).assert_outcomes(passed=1)


# ---------------------------------------------------------------------------------------- workers

WORKERS = """
import os, time, pytest, torch

def look():
    assert torch.cuda.device_count() == 1, os.environ.get("CUDA_VISIBLE_DEVICES")
    torch.ones(2, device="cuda").sum().item()
    time.sleep(1)

@pytest.mark.lora_gpu(min_vram_gb=2)
@pytest.mark.parametrize("n", range(4))
def test_small(n): look()

@pytest.mark.lora_gpu
@pytest.mark.parametrize("n", range(2))
def test_whole(n): look()
"""


@pytest.mark.lora_slow
@pytest.mark.parametrize("pinned", ["early", "late"])
def test_workers_share_a_card(pytester: pytest.Pytester, pinned: str) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(WORKERS)
    args = ["--lora-require-gpu"] if pinned == "early" else []
    result = pytester.runpytest_subprocess("-n", "2", *args)
    result.assert_outcomes(passed=6)
    now: set[str] = set()
    most = 0
    for event in map(json.loads, (pytester.path / "holds.log").read_text().splitlines()):
        (now.add if event["event"] == "hold" else now.discard)(event["who"])
        assert len(now) == 1 or not any("whole" in who for who in now)
        most = max(most, len(now))
    assert most == 2


@pytest.mark.lora_slow
@pytest.mark.lora_gpu(count=2)
def test_a_worker_that_started_cuda_too_early_says_so(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    pytester.makeconftest("import torch\ntorch.cuda.is_available()\ntorch._C._cuda_getDeviceCount()")
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu\ndef test_it(): ...")
    result = pytester.runpytest_subprocess("-n", "1", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["*CUDA was started before it could be pinned; ini lora_gpus_per_worker = 1 *"]
    )
    pytester.runpytest_subprocess("-n", "1", "-o", "lora_gpus_per_worker=1").assert_outcomes(passed=1)


@pytest.mark.lora_slow
@pytest.mark.lora_gpu(count=2)
def test_a_test_gets_two_devices(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(
        "import pytest, torch\n@pytest.mark.lora_gpu(count=2)\ndef test_it(): assert torch.cuda.device_count() >= 2"
    )
    pytester.runpytest_subprocess("-n", "2").assert_outcomes(passed=1)


@pytest.mark.lora_slow
def test_workers_that_keep_a_base_take_turns(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    free = torch.cuda.mem_get_info()[0]
    share = round(free * 0.6 / GB, 1)
    pytester.makepyfile(
        f"""
        import time, pytest, torch

        @pytest.fixture(scope="session")
        def base(): return torch.empty({int(free * 0.55)}, dtype=torch.uint8, device="cuda")

        @pytest.mark.lora_gpu(min_vram_gb={share})
        @pytest.mark.parametrize("n", range(6))
        def test_it(base, n): time.sleep(0.2)
        """
    )
    pytester.runpytest_subprocess("-n", "2", "--lora-require-gpu").assert_outcomes(passed=6)


@pytest.mark.lora_slow
def test_the_command_of_the_example_workflow_runs_on_one_card(pytester: pytest.Pytester) -> None:
    """With the built-in base in every worker; the tests are those of a user who has read the page."""
    pytester.makepyfile(WORKERS.replace("time.sleep(1)", "time.sleep(0.1)"))
    pytester.runpytest_subprocess(*example_command()).assert_outcomes(passed=6)
