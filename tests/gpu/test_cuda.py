"""On a real CUDA device: what the simulated cards of tests/plugin cannot show. Run with --lora-require-gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_lora import assert_lora_healthy, assert_loss_decreases
from tests.plugin.test_gpu_memory import section

pytestmark = pytest.mark.lora_gpu(min_vram_gb=4)


@pytest.mark.lora_vram_limit("2GiB")
def test_the_4_bit_adapter_is_healthy_and_learns(
    lora_model: Any, lora_batch: dict[str, torch.Tensor], lora_device: torch.device
) -> None:
    assert lora_device.type == "cuda"
    weight = lora_model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.device.type == "cuda"
    assert weight.quant_state.quant_type == "nf4"
    assert_lora_healthy(lora_model)
    assert_loss_decreases(lora_model, lora_batch, steps=20)


def test_a_test_over_its_limit_fails_with_the_peak(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.lora_vram_limit("32MiB")
        def test_over():
            torch.zeros(64 * 2**20, dtype=torch.uint8, device="cuda")

        @pytest.mark.lora_vram_limit("64MiB")
        def test_at_it():
            torch.zeros(64 * 2**20, dtype=torch.uint8, device="cuda")
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=1, passed=1)
    (line,) = section(result.outlines, "test_over")
    assert line.startswith("peak memory of 64.0 MiB on cuda:")
    assert line.endswith(' is over the limit of 32.0 MiB, by @pytest.mark.lora_vram_limit("32MiB")')


def test_what_a_test_leaves_is_told(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest, torch

        pytestmark = pytest.mark.lora_gpu
        KEPT = []

        def test_keeps(): KEPT.append(torch.zeros(2**20, device="cuda"))

        def test_fails():
            block = torch.zeros(2**20, device="cuda")
            assert block.sum() == 1

        def test_multiplies():
            square = torch.ones(64, 64, device="cuda")
            square @ square

        def test_adapter(lora_model, lora_batch): lora_model(**lora_batch).loss.backward()
        """
    )
    result = pytester.runpytest_subprocess("--lora-device", "cuda")
    result.assert_outcomes(failed=1, passed=3)
    lines = section(result.outlines, "GPU tests")
    assert len(lines) == 1, lines
    assert lines[0].startswith("test_it.py::test_keeps left 4.0 MiB (4194304 bytes) allocated on cuda:")


def test_out_of_memory_is_diagnosed_and_the_next_test_runs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        pytestmark = pytest.mark.lora_gpu

        def test_too_much():
            held = torch.zeros(64 * 2**20, dtype=torch.uint8, device="cuda")
            torch.empty(2**44, dtype=torch.uint8, device="cuda")

        def test_next():
            assert torch.cuda.memory_allocated() == 0
            assert torch.ones(2, device="cuda").sum() == 2
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["out of memory on cuda:*", "  peak of the test * 64.0 MiB", "fix: *"])


def test_a_device_side_assert_stops_the_gpu_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        pytestmark = pytest.mark.lora_gpu

        def test_breaks():
            torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]

        @pytest.mark.parametrize("n", range(3))
        def test_more(n): torch.ones(2, device="cuda").sum().item()
        """
    )
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(failed=1, skipped=3)
    result.stdout.fnmatch_lines(
        ["*test_breaks broke CUDA: 3 GPU tests were not run after it in that process"]
    )
