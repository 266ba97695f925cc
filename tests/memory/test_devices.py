"""What differs from GPU to GPU: workspaces, kernels of attention, unpacked weights; asked of played devices."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig

from pytest_lora import check_memory, estimate_memory
from pytest_lora.facts.memory_choices import ATTENTION_KERNELS
from pytest_lora.inspection.memory import live_model
from tests.simulated_cuda import MACHINES, Machine, play

AMPERE, HOPPER = 8_519_680, 33_554_432
CUDA = [name for name, machine in MACHINES.items() if machine.kind == "cuda"]


def small(heads: int = 4) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=heads,
        vocab_size=512,
    )


def adapter() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def estimated(base: Any = None, **setting: Any) -> Any:
    return estimate_memory(adapter(), base or small(), **{"batch_size": 2, "seq_len": 64, **setting})


@pytest.mark.parametrize("workspace", [AMPERE, HOPPER])
def test_forward_and_backward_have_a_workspace_each(workspace: int) -> None:
    none, some = estimated(workspace=512), estimated(workspace=workspace)
    assert some.breakdown["workspace"] == 2 * workspace
    assert some.over_ranks == 0  # there is one GPU
    assert some.after_step - none.after_step == 2 * (workspace - 512)
    assert some.loaded == none.loaded  # there is none before the first product of matrices
    assert estimated().breakdown["workspace"] == 2 * AMPERE


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Play a machine with a kernel of attention, and answer for its device."""

    def ask(machine: Machine, kernel: Any = "flash") -> Any:
        played = play(monkeypatch, machine)
        real = torch.empty

        def empty(*size: Any, device: Any = None, **named: Any) -> torch.Tensor:
            return real(*size, device=None if str(device).startswith("cuda") else device, **named)

        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch, "empty", empty)
        chosen = list(ATTENTION_KERNELS).index(kernel)
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: chosen)
        return played

    return ask


@pytest.mark.parametrize("name", CUDA)
def test_a_device_says_its_workspace_and_its_kernel(asked: Any, name: str) -> None:
    asked(MACHINES[name], "cudnn")
    assert live_model.of_device("cuda:0") == (MACHINES[name].workspace, "cudnn")


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("H200", "", HOPPER),
        ("MIG", "", HOPPER),
        ("L4", "", AMPERE),
        ("ROCm", "", HOPPER),
        ("L4", ":16:8", 16 * 8 * 1024),
        ("H200", ":4096:2:16:8", AMPERE),
    ],
)
def test_an_older_torch_is_answered_for(
    asked: Any, monkeypatch: pytest.MonkeyPatch, name: str, written: str, expected: int
) -> None:
    asked(MACHINES[name])
    monkeypatch.delattr(torch.backends.cuda, "cublas_workspace_size")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", written)
    assert live_model.of_device("cuda:0").workspace == expected


class OnTheGpu(nn.Module):
    """A live model whose parameters say that they are on a GPU."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([type("Weight", (), {"device": torch.device("cuda", 0)})()])


def test_a_live_model_is_answered_for_by_its_device_and_nothing_else_starts_cuda(asked: Any) -> None:
    played = asked(MACHINES["H200"])
    assert live_model.of_model(nn.Linear(2, 2)) == live_model.of_model(small()) == live_model.ASSUMED
    estimated()
    assert not played.started
    assert live_model.of_model(OnTheGpu()) == (HOPPER, "flash")


def test_a_budget_that_is_a_device_is_asked_for_more_than_its_size(asked: Any) -> None:
    asked(MACHINES["H200"], "math")
    step = {"batch_size": 2, "seq_len": 64}
    said = check_memory(adapter(), small(), budget="cuda:0", **step).to_json()
    known = {"budget": MACHINES["H200"].total, "workspace": HOPPER, "attention": "math"}
    assert said == check_memory(adapter(), small(), **known, **step).to_json()
    assert said != check_memory(adapter(), small(), budget="cuda:0", workspace=512, **step).to_json()


def test_kernels_of_attention_hold_what_they_hold() -> None:
    peaks = {
        k: estimated(small(2), attention=k, batch_size=4, seq_len=512).peak_allocated
        for k in ATTENTION_KERNELS
    }
    assert peaks["cudnn"] <= peaks["flash"] < peaks["math"]
    assert peaks["efficient"] == peaks["math"]  # it has no grouped heads
    alike = {
        k: estimated(small(4), attention=k, batch_size=4, seq_len=512).peak_allocated
        for k in ATTENTION_KERNELS
    }
    assert alike["efficient"] == alike["flash"] == alike["cudnn"] < alike["math"]
    with pytest.raises(
        ValueError, match="attention must be one of math, flash, efficient, cudnn, not 'eager'"
    ):
        estimated(attention="eager")


@pytest.mark.parametrize("double", [False, True])
def test_the_forward_of_a_packed_layer_holds_its_weight_unpacked(double: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    from pytest_lora.inspection.bitsandbytes_internals import pack_on_meta
    from pytest_lora.inspection.memory.meta_answers import StandIns
    from pytest_lora.inspection.memory.storage_tracker import StorageTracker

    layer = Linear4bit(256, 512, bias=False, device="meta", compress_statistics=double)
    pack_on_meta(layer, torch.bfloat16)
    tracker = StorageTracker(None, StandIns(padded=False, experts=None))
    given = torch.empty(4, 256, dtype=torch.bfloat16, device="meta")
    for tensor in (given, *layer.parameters()):
        tracker.ignore(tensor)
    with torch.no_grad(), tracker.recorded():
        layer(given)
    unpacked = [i for i, category in enumerate(tracker.categories) if category == "dequantization buffers"]
    sizes = sorted(tracker.sizes[i] for i in unpacked)
    assert sizes[-1] == 256 * 512 * 2
    assert (len(sizes) > 1) == double
    assert all(~i in tracker.events for i in unpacked)
