"""What the checks promise on a real CUDA device: nothing moves, nothing is left, memory is as predicted."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pytest_lora import (
    assert_lora_healthy,
    assert_lora_laws,
    assert_loss_decreases,
    assert_merge_exact,
    assert_reload_exact,
    check_training,
    run_distributed,
)
from pytest_lora.bases.tiny import load_tiny, text_batch
from pytest_lora.inspection.memory.live_model import of_device
from tests import ranks

pytestmark = [pytest.mark.lora_gpu(min_vram_gb=4), pytest.mark.filterwarnings("ignore")]


def adapted(device: str = "cuda", **base: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_tiny(device=device, **base), config)


def state(model: Any) -> dict[str, tuple[torch.Tensor, torch.device]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.detach().cpu().clone(), tensor.device) for name, tensor in named}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = [
        n for n, (t, place) in before.items() if after[n][1] != place or not torch.equal(t, after[n][0])
    ]
    assert not changed


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", None])
def test_the_loss_falls_and_nothing_is_left(quantization: Any) -> None:
    model = adapted(quantization=quantization)
    before, generator = state(model), torch.cuda.get_rng_state()
    assert_loss_decreases(model, text_batch(device="cuda"), steps=20)
    assert_same(before, state(model))
    assert torch.equal(generator, torch.cuda.get_rng_state())


@pytest.mark.parametrize("loss_fn", [None, lambda model, batch: model(**batch).loss])
def test_a_model_on_the_cpu_stays_there_or_moves_with_its_batches(loss_fn: Any) -> None:
    model = adapted("cpu")
    before = state(model)
    allocated = torch.cuda.memory_allocated()
    assert_loss_decreases(model, text_batch(), steps=5, loss_fn=loss_fn)
    assert torch.cuda.memory_allocated() == allocated
    assert_loss_decreases(model, text_batch(), steps=5, loss_fn=loss_fn, device="cuda")
    assert_same(before, state(model))


def test_a_base_in_8_bits_is_never_moved() -> None:
    with pytest.raises(ValueError, match="quantized to 8 bits"):
        assert_loss_decreases(adapted("cpu", quantization="int8"), text_batch(), device="cuda")


def test_labels_outside_the_vocabulary_do_not_break_cuda() -> None:
    batch = text_batch(device="cuda")
    batch["labels"][0, 5] = 5000
    assert check_training(adapted(), batch).errors
    torch.cuda.synchronize()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_behaviour_is_exact_in_float32_with_and_without_tf32(precision: str) -> None:
    model = adapted(quantization=None, compute_dtype="float32")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for check in (assert_merge_exact, assert_reload_exact, assert_lora_laws):
            check(model, text_batch(device="cuda"))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_packed_model_is_healthy_saved_and_merged() -> None:
    model, batch = adapted(), text_batch(device="cuda")
    assert_lora_healthy(model, batch=batch)
    assert_reload_exact(model, batch)
    assert_merge_exact(model, batch)


ON_THE_CPU = """
import torch
from peft import LoraConfig, get_peft_model
from pytest_lora import assert_lora_healthy, assert_merge_exact, assert_reload_exact, check_training
from pytest_lora.bases.tiny import load_tiny, text_batch
model = get_peft_model(load_tiny(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
for check in (assert_reload_exact, assert_merge_exact, check_training): check(model, text_batch())
assert_lora_healthy(model)
assert not torch.cuda.is_initialized()
"""

FIRST_TO_USE_CUDA = """
import torch
from pytest_lora import rank_sweep
from tests.sweep import toys
def make_model(): return toys.make_model().cuda()
def train(model, plan):
    for batch in plan.share(toys.data()): (model(batch.cuda()) - 1).square().mean().backward()
torch.manual_seed(11)
rank_sweep(make_model, train, lambda model: 1.0, config=toys.CONFIG, ranks=[2], progress=False)
assert torch.cuda.is_initialized()
expected = torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(11))
assert torch.equal(torch.rand(3, device="cuda"), expected)
"""


@pytest.mark.parametrize(
    "script", [ON_THE_CPU, FIRST_TO_USE_CUDA], ids=["starts nothing", "first to use CUDA"]
)
def test_a_process_of_its_own(script: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


WORKSPACES = """
import torch
from pytest_lora.inspection.memory.live_model import of_device
said = of_device("cuda:0").workspace
torch._C._cuda_clearCublasWorkspaces()
before = torch.cuda.memory_allocated()
given = torch.ones(64, 64, device="cuda", requires_grad=True)
(given @ given).sum().backward()
torch.cuda.synchronize()
del given
left = torch.cuda.memory_allocated() - before
assert left == 2 * said, (left, said)
"""


def test_forward_and_backward_take_a_workspace_each_as_the_device_says() -> None:
    subprocess.run([sys.executable, "-c", WORKSPACES], check=True, timeout=120)


def test_the_device_says_which_kernel_of_attention_runs() -> None:
    answers = of_device("cuda:0")
    assert answers.attention in ("math", "flash", "efficient", "cudnn")
    if torch.cuda.get_device_capability() >= (8, 0) and not torch.version.hip:
        assert answers.attention in ("flash", "cudnn")


def test_nccl_needs_a_gpu_for_each_rank() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"needs a GPU for each of {count + 1} ranks"):
        run_distributed(ranks.no_adapter, count + 1, "nccl")


@pytest.mark.lora_slow
@pytest.mark.lora_gpu(count=2)
def test_two_ranks_have_a_gpu_each() -> None:
    assert run_distributed(ranks.own_device, 2, "nccl", timeout=60) == ["cuda:0", "cuda:1"]
