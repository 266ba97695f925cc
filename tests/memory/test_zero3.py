"""What ZeRO-3 does beside dividing weights: its own linear layers, a quantized base that is whole at first."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from pytest_lora import check_memory, estimate_memory, largest_that_fits, step_memory
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.cuda_allocator import communication_of
from pytest_lora.inspection.memory.meta_answers import StandIns
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.inspection.memory.parallel import whole
from pytest_lora.inspection.memory.parallel.zero3 import (
    Gathered,
    Limits,
    Part,
    _Coordinator,
    _order,
    gathered,
    zero3_linears,
)
from pytest_lora.inspection.memory.storage_tracker import StorageTracker
from pytest_lora.inspection.parallel_files import read_parallel
from pytest_lora.memory.setting import checked_setting
from tests.memory.test_parallel import BASE, LORA

MIB = 2**20


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_linear_layer_of_zero_3_gives_what_torch_gives(shape: tuple[int, ...], biased: bool) -> None:
    def run() -> list[torch.Tensor]:
        given = torch.arange(24.0)[: 12 if len(shape) == 2 else 24].reshape(shape).requires_grad_()
        weight = torch.linspace(-1, 1, 20).reshape(5, 4).requires_grad_()
        bias = torch.ones(5, requires_grad=True) if biased else None
        output = functional.linear(given, weight, bias)
        (output**2).sum().backward()
        found = [output, given.grad, weight.grad, *([bias.grad] if bias is not None else [])]
        return [tensor for tensor in found if tensor is not None]

    theirs = run()
    with zero3_linears():
        ours = run()
    assert len(ours) == len(theirs) == 3 + biased
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    assert functional.linear.__name__ == "linear", "put back"


def test_it_saves_the_input_of_a_frozen_weight() -> None:
    def kept() -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        given, weight = torch.ones(2, 4, requires_grad=True), torch.ones(5, 4)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda held: shapes.append(tuple(held.shape)) or held, lambda held: held
        ):
            functional.linear(given, weight)
        return shapes

    assert (2, 4) not in kept()
    with zero3_linears():
        assert (2, 4) in kept()


def activations(**options: Any) -> int:
    """Bytes of a step without checkpoints, whose layers keep what their backward needs."""
    parallel = Parallel(2, "zero3", options=tuple(options.items()))
    found = estimate_memory(LORA, BASE, batch_size=4, seq_len=128, parallel=parallel)
    return found.breakdown["activations"]


def test_its_layers_keep_more() -> None:
    """What goes into ``gate_proj`` and ``up_proj`` is the input of frozen weights, and kept by nobody else."""
    assert activations() > activations(memory_efficient_linear=False)


@pytest.mark.parametrize(
    ("said", "on"),
    [
        ({}, True),
        ({"memory_efficient_linear": True}, True),
        ({"memory_efficient_linear": False}, False),
        ({"memory_efficient_linear": "false"}, False),
    ],
)
def test_a_configuration_says_whether_they_are_put_in(said: dict[str, Any], on: bool) -> None:
    read = read_parallel({"zero_optimization": {"stage": 3, **said}}, 2)
    theirs = functional.linear
    with whole._around_of_zero(torch.nn.Linear(2, 2), 3, read)(
        StorageTracker(None, StandIns(padded=False, experts=None))
    ):
        assert (functional.linear is not theirs) is on


def rank_of(strategy: str = "zero3", offload: Any = None, **more: Any) -> Any:
    setting = checked_setting(parallel=Parallel(4, strategy, offload=offload), **more)
    model = build(BASE, LORA, setting)
    assert model.rank is not None
    return model.rank


PACKED: dict[str, Any] = {"quantization": "nf4", "prepare_for_kbit": False}


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_quantized_base_is_whole_on_each_gpu_before_it_is_divided(offload: Any) -> None:
    rank = rank_of(offload=offload, **PACKED)
    loading = rank.loading
    held = list(accumulate(loading.sizes[e] if e >= 0 else -loading.sizes[~e] for e in loading.events))
    everything = sum(p.numel() * p.dtype.itemsize for p in rank.called.parameters())
    assert held[len(list(rank.called.parameters())) - 1] == everything
    parts = sum(w.size for w in rank.weights if w.category in ("parameter shards", "adapters"))
    assert held[-1] == parts
    assert (parts == 0) is (offload == "cpu")


def test_one_that_is_not_quantized_is_divided_as_it_is_made() -> None:
    assert rank_of().loading is None
    assert rank_of("zero2", **PACKED).loading is None


WIDE = LlamaConfig(**{**BASE.to_dict(), "hidden_size": 1024, "intermediate_size": 4096})
"""Whose packed layers outweigh the workspaces of cuBLAS."""


def test_what_loading_takes_is_told_and_decides_whether_it_fits() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 0}
    zero |= {"stage3_max_reuse_distance": 1, "stage3_param_persistence_threshold": 1}
    asked: dict[str, Any] = {"batch_size": 1, "seq_len": 8, "gpus": 8, **PACKED}
    asked["parallel"] = {"zero_optimization": zero}
    found = estimate_memory(LORA, WIDE, **asked)
    assert found.loading > found.peak_allocated > found.loaded
    assert found.peak_loading == found.loading <= found.peak_reserved
    assert found.fits(found.loading)
    assert not found.fits(found.loading - 1)
    assert "while it is loaded" in str(found)
    sizes = {name: value for name, value in asked.items() if name != "batch_size"}
    assert largest_that_fits(LORA, WIDE, found.loading - 1, vary="batch_size", **sizes) == 0
    assert largest_that_fits(LORA, WIDE, found.loading, vary="batch_size", **sizes) > 0
    report = check_memory(LORA, WIDE, budget=found.loading - 1, **asked)
    assert [finding.code for finding in report.findings] == ["LORA501"]
    assert "it is divided afterwards" in report.findings[0].observed


SHORT = [[[1024]], [[512], [512]], [[2048]]]
"""Numbers of embeddings, of the two modules of a layer, and of a head."""


def parts(
    *layers: int, checkpointed: bool = False, ahead: int = 0, reuse: int = 0, live: int = 10**9
) -> Gathered:
    units = [[[Part(numel, 1) for numel in module] for module in unit] for unit in SHORT]
    again = [False, checkpointed, False]
    for _ in layers:
        units.insert(1, units[1])
        again.insert(1, checkpointed)
    return gathered(units, again, Limits(ahead, reuse, live))


def test_gathered_one_by_one_the_largest_is_whole() -> None:
    assert parts().allocated == 2048


def test_what_is_gathered_ahead_lies_in_a_buffer_beside_its_copies() -> None:
    """Both modules of the layer come together in 1,024, of which each is copied out while the head comes too."""
    assert parts(ahead=1000).allocated == 1024 + 2 * 512 + 2048
    assert parts(ahead=500).allocated < parts(ahead=1000).allocated, "one alone needs no copy"
    assert parts(ahead=1000, live=1000).allocated < 4096, "the embeddings leave no room"


def test_what_is_used_again_soon_stays() -> None:
    assert parts(reuse=10**9).allocated == 512 + 512 + 2048, "embeddings go: nothing of them goes backward"
    assert parts(reuse=10**9, checkpointed=True).allocated == 1024 + 512 + 512 + 2048
    assert parts(reuse=4097).allocated == 2048 + 512, "the second module, beyond the head and its backward"
    assert parts(reuse=4096).allocated == 2048


def test_what_the_queue_has_passed_is_kept_for_its_last_use() -> None:
    """All comes at once, one buffer and three copies; the head alone goes and comes again, for the next module."""
    units = [[[Part(numel, 1) for numel in module] for module in unit] for unit in SHORT]
    order = list(_order(units, [False] * 3))
    assert order == [[0], [1], [2], [3], [3], [2], [1]]
    everything = [part for unit in units for module in unit for part in module]
    step = _Coordinator(everything, order, Limits(ahead=10**6, reuse=0, live=10**9))
    step.run(ahead=True)
    assert step.sizes == [1024, 512 + 512 + 2048, 512, 512, 2048, 2048]


def test_the_allocator_reserves_whole_segments_for_it() -> None:
    found = parts(ahead=1000)
    assert found.reserved == 2 * MIB
    assert gathered([[]], [False], Limits(1, 1, 1)) == Gathered(0, 0)


def test_it_is_reserved_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(more: int) -> tuple[int, int]:
        monkeypatch.setattr(whole, "gathered", lambda *_: Gathered(4 * MIB, 4 * MIB + more))
        parallel = Parallel(2, "zero3", options=(("reduce_bucket_size", 1000 + more),))
        found = step_memory(LORA, BASE, parallel=parallel)
        return found.peak_allocated(1, 8), found.peak_reserved(1, 8)

    (allocated, reserved), plain = figures(512), figures(0)
    assert reserved - plain[1] == 512
    assert allocated - plain[0] == 1024, "the bucket, in bfloat16"


def test_what_nccl_takes_beside_the_step() -> None:
    for alone in (None, Parallel(1, "ddp"), Parallel(4, "device_map")):
        assert communication_of(alone) == 0
    assert communication_of(Parallel(2, "ddp")) == 544 * MIB
    assert communication_of(Parallel(8, "fsdp2")) == 688 * MIB
    for strategy in ("hsdp", "zero1", "zero2", "zero3"):
        assert communication_of(Parallel(8, strategy)) == 2 * 688 * MIB
    found = estimate_memory(LORA, BASE, batch_size=1, seq_len=8, gpus=2)
    assert found.on_device == found.peak_reserved + 512 * MIB + 544 * MIB
    assert "NCCL beside it" in str(found)
    assert "NCCL" not in str(estimate_memory(LORA, BASE, batch_size=1, seq_len=8))


def test_its_operations_are_those_of_deepspeed() -> None:
    """One for a matrix with a bias, two for more dimensions; no gradient for a bias that is frozen."""

    class Said(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def operations(*shape: int, frozen: bool = True) -> set[str]:
        given, bias = torch.ones(*shape, 4, requires_grad=True), torch.ones(5, requires_grad=not frozen)
        with Said() as said, zero3_linears():
            functional.linear(given, torch.ones(5, 4), bias).backward(torch.ones(*shape, 5))
        return {name for name in said.names if name in ("addmm", "add_", "sum")}

    assert operations(2) == {"addmm"}
    assert operations(2, 3) == {"add_"}
    assert operations(2, frozen=False) == {"addmm", "sum"}


def test_embeddings_that_go_backward_are_gathered_ahead_too() -> None:
    units = [[[Part(numel, 1) for numel in module] for module in unit] for unit in SHORT]
    order = list(_order(units, [False, True, False]))
    assert order[-1] == [0]
    everything = [part for unit in units for module in unit for part in module]
    step = _Coordinator(everything, order, Limits(ahead=600, reuse=0, live=10**9))
    step.run(ahead=True)
    assert 512 + 1024 in step.sizes, "a buffer for the layer's first module and the embeddings"
