"""Single formulas of the memory predictor: numbers that were worked out by hand, functions that are called alone."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from pytest_lora.facts.memory import Quantization, StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.facts.operations import StepFlops
from pytest_lora.inspection.memory import live_model, operations, optimizers
from pytest_lora.inspection.memory.batches import image_edges, images_for
from pytest_lora.inspection.memory.estimate import _filled, gpu_of_events
from pytest_lora.inspection.memory.fused_losses import liger_chunk
from pytest_lora.inspection.memory.layer_stacks import Cut, is_numbered, marks, same_in_every_layer
from pytest_lora.inspection.memory.learning import numbers_of, runs_alike, shares_of, thresholds_of
from pytest_lora.inspection.memory.live_model import _attention
from pytest_lora.inspection.memory.meta_answers import (
    KnownResults,
    StandIns,
    _ctc_loss,
    _grouped_mm,
    _is_of_its_own,
    _masked,
    _split,
)
from pytest_lora.inspection.memory.operations import FlopsSurface, require_like_inner_units, times_played
from pytest_lora.inspection.memory.optimizers import OPTIMIZERS, state_bytes
from pytest_lora.inspection.memory.packed_weights import _STORED, pack_weights
from pytest_lora.inspection.memory.parallel import autocasts, cuts_of, placed, whole
from pytest_lora.inspection.memory.parallel.placed import Placement, _gpu_of, _whole, moved_between_gpus
from pytest_lora.inspection.memory.parallel.whole import _number, _part, _width
from pytest_lora.inspection.memory.step import Step, _flops
from pytest_lora.inspection.memory.timeline import NotRepeatingError, Timeline
from pytest_lora.inspection.memory.unmodelled import _cache_of_generation

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---------------------------------------------------------------------------------- operations


def test_operations_of_products() -> None:
    assert operations.product_flops(meta(3, 5), meta(5, 7)) == 210
    assert operations._packed_product((2, 3, 5), (1,), (7, 5)) == 420
    assert operations._int8_product((3, 5), (7, 5)) == 210
    assert operations._mixed_int8_product((3, 5), (1,), (7, 5)) == 210
    assert operations._grouped_product((3, 5), (4, 5, 7)) == 210
    assert operations._grouped_product((4, 3, 5), (4, 5, 7)) == 840
    assert operations._grouped_product((3, 5), (5, 7)) == 210
    assert operations.flops_of(aten.mm.default, (meta(3, 5), meta(5, 7)), {}, None) == 210
    assert operations.flops_of(aten.bmm.default, (meta(2, 3, 5), meta(2, 5, 7)), {}, meta(2, 3, 7)) == 420
    assert operations.flops_of(aten.add.Tensor, (meta(3), meta(3)), {}, meta(3)) == 0
    query, key, value = meta(2, 8, 3, 5), meta(2, 4, 7, 5), meta(2, 4, 7, 6)
    # Scores and their product with the values, for each of 2 x 8 heads; the backward computes the scores again.
    assert operations.attention_flops(query, key, value) == 2 * 16 * (3 * 5 * 7 + 3 * 7 * 6)
    products = 3 * 5 * 7 + 3 * 6 * 7 + 7 * 3 * 6 + 3 * 7 * 5 + 5 * 3 * 7
    assert operations.attention_backward_flops(query, key, value) == 2 * 16 * products


@pytest.mark.parametrize(
    ("unit", "times"), [(-1, 1), (0, 1), (1, 1), (2, 8), (3, 1), (4, 1), (7, 3), (8, 1), (12, 1), (-3, 1)]
)
def test_an_inner_unit_stands_for_all_but_one(unit: int, times: int) -> None:
    assert times_played(unit, {0: 9, 1: 4}) == times


def test_own_formulas_fill_only_what_torch_and_bitsandbytes_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(*given: Any, **named: Any) -> int:
        return 0

    monkeypatch.setattr(operations, "_OF_BITSANDBYTES", {"none_such": ours})
    monkeypatch.setattr(operations, "_grouped_product", ours)
    assert None not in operations._formulas.__wrapped__()
    monkeypatch.setattr(operations, "flop_registry", {aten._grouped_mm: None})
    assert ours not in operations._formulas.__wrapped__().values()
    monkeypatch.setattr(operations, "flop_registry", {})
    assert aten._grouped_mm in operations._formulas.__wrapped__()


def test_inner_units_that_compute_other_amounts_are_refused() -> None:
    like = [(2, "forward", 5), (3, "forward", 2), (3, "forward", 3), (7, "backward", 9)]
    require_like_inner_units(like, {0: 4})
    with pytest.raises(NotRepeatingError):
        require_like_inner_units(like, {0: 4, 1: 4})
    with pytest.raises(NotRepeatingError):
        require_like_inner_units([(2, "backward", 5)], {0: 4})


def test_operations_of_a_step_are_those_of_all_layers_and_micro_batches() -> None:
    def micro(count: int) -> Any:
        inner = [(unit, "forward", count) for unit in (2, 3)]
        return SimpleNamespace(flops=[(-1, "forward", 100), *inner, (0, "backward", 7)])

    total, counted = _flops([micro(10), micro(1)], {0: 6}, 4)
    assert counted[:4] == [("forward", 1, 100), ("forward", 5, 10), ("forward", 1, 10), ("backward", 1, 7)]
    assert counted[4:] == [("forward", 3, 100), ("forward", 15, 1), ("forward", 3, 1), ("backward", 3, 7)]
    assert total == StepFlops(160 + 318, 28)
    assert _flops([micro(10)], {0: 6}, 1)[0] == StepFlops(160, 7)
    step = Step(units=[-1, 0, 2, 3, 4, 7, 8], copies={0: 6, 1: 3})
    assert step.whole_length() == 12


def test_operations_between_known_points_are_exact_or_none() -> None:
    points = [(b, n, r) for b in (2, 3) for n in (10, 20, 40) for r in (8, 16)]
    surface = FlopsSurface(points, [StepFlops(b * n * n + 3 * r, 7 * b * n * r) for b, n, r in points])
    assert surface((5, 33, 12)) == StepFlops(5 * 33 * 33 + 36, 7 * 5 * 33 * 12)
    halves = FlopsSurface(points, [StepFlops(n // 10 * r, 0) for _, n, r in points])
    assert halves((2, 15, 8)) == StepFlops(12, 0)
    assert halves((2, 11, 8)) is None
    assert operations._lagrange([2, 4], 5) == {2: Fraction(-1, 2), 4: Fraction(3, 2)}


# ---------------------------------------------------------------------------------- several GPUs


def options(**given: Any) -> Parallel:
    return Parallel(4, "zero3", options=tuple(given.items()))


def test_numbers_of_a_configuration_of_deepspeed() -> None:
    assert (_part(8, 4), _part(9, 4), _part(1, 4)) == (2, 3, 1)
    assert _number(options(), "size", 500, 30) == 500
    assert _number(options(size="auto"), "size", 500, 30) == 30
    assert _number(options(size="auto"), "size", 500, 0) == 500
    assert _number(options(size="1e3"), "size", 500, 30) == 1000
    assert _number(options(size=7), "size", 500, 30) == 7


def test_numbers_that_others_have_fixed() -> None:
    """DeepSpeed's defaults, bitsandbytes' pages, and workspaces of cuBLAS and hipBLAS."""
    assert (whole.REDUCE_BUCKET, whole.PREFETCH_BUCKET) == (500_000_000, 50_000_000)
    assert (whole.PERSISTENT_UP_TO, whole.REUSE_DISTANCE) == (100_000, 1_000_000_000)
    assert optimizers.PAGED_FROM == 100_000
    assert (live_model.HOPPER_WORKSPACE, live_model._ON_INSTINCT) == (33_554_432, 134_217_728)


def test_the_width_of_a_base() -> None:
    def width(**fields: Any) -> int:
        built: Any = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(**fields)))
        return _width(built)

    assert (width(), width(hidden_size=None), width(hidden_size=7)) == (0, 0, 7)
    assert width(hidden_size=7, text_config=SimpleNamespace(hidden_size=9)) == 9


def test_which_weights_the_planner_takes_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = nn.Module()
    base.inner, base.head, base.norm = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.LayerNorm(2)
    asked: list[Any] = []
    monkeypatch.setattr(placed, "kept_whole", lambda base, skipped: asked.append(skipped) or ["head"])
    packed = StepSetting(1, 1, quantization=Quantization("nf4", skip_modules=("a",)))
    assert _whole(base, packed) == ["inner.bias", "head.weight", "norm.weight", "norm.bias"]
    _whole(base, StepSetting(1, 1, quantization=Quantization("nf4")))
    assert asked == [["a"], None]
    assert _whole(base, StepSetting(1, 1)) == []
    planner = SimpleNamespace(CustomDtype=SimpleNamespace(INT4="int4"))
    for method, stored in (("nf4", "int4"), ("gptq", "int4"), ("int8", torch.int8), ("fp8", torch.int8)):
        assert placed._stored(planner, StepSetting(1, 1, quantization=Quantization(method))) == stored
    assert placed._stored(planner, StepSetting(1, 1, dtype="float16")) == torch.float16


@pytest.mark.parametrize(
    ("chosen", "kernel"),
    [(0, "math"), (1, "flash"), (2, "efficient"), (3, "cudnn"), (4, "flash"), (9, "flash")],
)
def test_the_kernel_of_attention_that_torch_chooses(
    monkeypatch: pytest.MonkeyPatch, chosen: int, kernel: str
) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **how: chosen)
    assert _attention("cpu") == kernel


def test_layers_that_are_cut_at_once_and_who_casts() -> None:
    first = cuts_of(Parallel(2, "fsdp1"))
    assert first == (Cut(2, before=1, after=1), Cut(2), Cut(4), Cut(0))
    placed = Cut(1), Cut(2), Cut(4), Cut(0)
    assert cuts_of(Parallel(2, "device_map")) == placed
    for strategy in ("ddp", "fsdp2", "hsdp", "tp", "zero3"):
        assert cuts_of(Parallel(2, strategy)) == (Cut(1, before=1, after=1), *placed)
    autocast = StepSetting(1, 1, autocast="bfloat16")
    assert autocasts(autocast)
    assert not autocasts(StepSetting(1, 1, autocast="bfloat16", parallel=Parallel(2, "zero2")))
    assert autocasts(StepSetting(1, 1, autocast="bfloat16", parallel=Parallel(2, "ddp")))
    assert not autocasts(StepSetting(1, 1, autocast=None))


def test_the_gpu_of_a_module_is_that_of_what_holds_it_or_of_its_first_part() -> None:
    plan = {"model.embed": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2.a": 2, "head": 1}
    assert _gpu_of("model.embed", plan) == 0
    assert _gpu_of("model.layers.1.proj.inner", plan) == 1
    assert _gpu_of("model.layers.2", plan) == 2
    assert _gpu_of("model", {"model.b": 3, "model.a": 1}) == 3
    assert _gpu_of("elsewhere", plan) == 2
    assert _gpu_of("", plan) == 2
    assert _gpu_of("elsewhere", {"": 0}) == 0


def test_what_runs_between_two_layers_runs_where_the_first_of_them_does() -> None:
    def filled(*gpus: int) -> list[int]:
        return _filled(np.array(gpus), 7, 9).tolist()

    assert filled(-1, 0, -1, 2, -1, -1) == [7, 0, 0, 2, 9, 9]
    assert filled(-1, -1) == [7, 7]
    assert filled(0, 1) == [0, 1]


def test_a_storage_lies_where_it_was_made() -> None:
    # Forward: outside, layer 0, layer 1, outside; backward: outside, layer 1, layer 0, outside.
    units = np.array([-1, 0, 1, -1, -1, 1, 0, -1])
    line = Timeline(
        (),
        np.array([1, 1, 1, 1, -1, -1, -1, -1]),
        np.arange(8),
        np.array([0, 1, 2, 3, 3, 2, 1, 0]),
        np.array([-1, 0, 1, -1, -1, 1, 0, -1]),
    )
    placement = Placement(4, ((2, 1),), first=3, last=0)
    backward = np.arange(8) >= 4
    found = gpu_of_events(line, units, backward, np.array([0, 4]), placement)
    assert found.tolist() == [3, 2, 1, 0, 0, 1, 2, 3]
    made = Timeline((), -line.weights, line.index, line.instances[::-1].copy(), line.layers)
    # All are made in the backward, which begins at the head and ends before the layers.
    assert gpu_of_events(made, units, backward, np.array([0, 4]), placement).tolist() == [
        3,
        2,
        1,
        0,
        0,
        1,
        2,
        3,
    ]


def test_what_accelerate_moves_and_generation_caches() -> None:
    config = SimpleNamespace(
        num_hidden_layers=3, num_attention_heads=8, hidden_size=64, num_key_value_heads=2, vocab_size=100
    )
    setting = StepSetting(5, 7, workspace=11)
    assert _cache_of_generation(config, setting) == 2 * 2 * 3 * 2 * 8 * 5 * 7
    assert moved_between_gpus(config, setting) == 4 * (100 + 2 * 64) * 5 * 7 + 11
    config.head_dim, config.num_key_value_heads = 16, None
    assert _cache_of_generation(config, setting) == 2 * 2 * 3 * 8 * 16 * 5 * 7
    assert _cache_of_generation(SimpleNamespace(text_config=config), setting) == 4 * 3 * 8 * 16 * 35
    for missing in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        partly = SimpleNamespace(**{**vars(config), missing: None})
        assert _cache_of_generation(partly, setting) == 0
    assert moved_between_gpus(SimpleNamespace(hidden_size=None, vocab_size=None), setting) == 11


# ---------------------------------------------------------------------------------- families


def test_what_ranks_are_shared_by() -> None:
    assert shares_of(StepSetting(1, 1)) == 1
    assert shares_of(StepSetting(1, 1, optimizer="adamw_8bit")) == 0
    assert shares_of(StepSetting(1, 1, optimizer="paged_adamw_32bit")) == 0
    assert shares_of(StepSetting(1, 1, parallel=Parallel(6, "zero3"))) == 0
    assert shares_of(StepSetting(1, 1, parallel=Parallel(6, "fsdp2"))) == 6
    assert shares_of(StepSetting(1, 1, parallel=Parallel(16, "hsdp", shard_size=8))) == 8
    for strategy, optimizer in (
        ("zero3", "adamw_torch"),
        ("zero2", "adamw_8bit"),
        ("ddp", "paged_adamw_32bit"),
    ):
        assert runs_alike(StepSetting(1, 1, optimizer=optimizer, parallel=Parallel(6, strategy)))
    for strategy in ("fsdp1", "fsdp2", "hsdp", "tp", "device_map"):
        assert not runs_alike(StepSetting(1, 1, optimizer="adamw_8bit", parallel=Parallel(6, strategy)))
    assert not runs_alike(StepSetting(1, 1, parallel=Parallel(6, "zero2")))
    assert not runs_alike(StepSetting(1, 1, optimizer="adamw_8bit"))
    assert shares_of(StepSetting(1, 1, parallel=Parallel(6, "ddp"))) == 1


def test_lengths_from_which_a_model_attends_otherwise() -> None:
    text = SimpleNamespace(attention_window=2, hidden_size=9)
    config = SimpleNamespace(sliding_window=4096, attention_chunk_size=1, text_config=text)
    assert thresholds_of(config) == [2, 4096]
    assert thresholds_of(SimpleNamespace(config=config)) == [2, 4096]
    assert thresholds_of(SimpleNamespace(sliding_window="4")) == []
    assert numbers_of(config) == {4096, 1, 2, 9}
    assert numbers_of(SimpleNamespace(a=3, b=2.5, text_config=None)) == {3}


@pytest.mark.parametrize(
    ("fields", "alike"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ".*q_proj"}, False),
        ({"target_modules": ["layers.3.q_proj"]}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, False),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 2]]}, False),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": "a.*"}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": ["a"]}, True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["1.a"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]}, False),
    ],
)
def test_whether_every_layer_is_adapted_alike(fields: dict[str, Any], alike: bool) -> None:
    assert same_in_every_layer(LoraConfig(**fields)) is alike


def test_marks_of_modules() -> None:
    assert [is_numbered(name) for name in ("a.3.b", "3", "q3", "a.3b")] == [True, True, False, False]
    asked = marks(LoraConfig(target_modules=".*(q|v)_proj", rank_pattern={"v_proj": 3}))
    assert asked is not None
    assert [asked(f"layers.1.{name}") for name in ("q_proj", "v_proj", "k_proj")] == [
        (True, None),
        (True, 3),
        False,
    ]
    asked = marks(LoraConfig(target_modules="all-linear", exclude_modules=".*k_proj"))
    assert asked is not None
    assert asked("layers.1.k_proj") is False
    assert asked("layers.1.q_proj") == (True, None)
    alike = marks(LoraConfig(target_modules=["q_proj"]))
    assert alike is not None
    assert alike("layers.1.q_proj") is None
    assert marks(LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1"])) is None
    assert marks(LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2]])) is None


# ---------------------------------------------------------------------------------- storages


@pytest.mark.parametrize(
    ("method", "how", "shape", "stored"),
    [
        ("gptq", {"bits": 4, "group_size": 32}, (48, 100), [(13, 48), (4, 6), (4, 48), (100,)]),
        ("gptq", {"bits": 3, "group_size": 0}, (48, 100), [(10, 48), (1, 5), (1, 48), (100,)]),
        ("awq", {"bits": 4, "group_size": 32}, (48, 100), [(100, 6), (4, 6), (4, 48)]),
        ("awq", {"bits": 8, "group_size": 0}, (48, 100), [(100, 12), (1, 12), (1, 48)]),
        ("fp8", {"block_size": (32, 64)}, (48, 100), [(48, 100), (2, 2)]),
        ("fp8", {}, (5, 48, 100), [(5, 48, 100), (5, 1, 1)]),
        ("mxfp4", {}, (5, 48, 64), [(7680,), (480,)]),
    ],
)
def test_shapes_that_are_stored(
    method: str, how: dict[str, Any], shape: tuple[int, ...], stored: list[tuple[int, ...]]
) -> None:
    packed, beside = _STORED[method](shape, Quantization(method, **how))
    assert [tuple(tensor.shape) for tensor in (packed, *beside)] == stored


def test_which_modules_are_packed() -> None:
    model = nn.Module()
    for name in ("head", "headless", "keep_a", "mlp"):
        model.add_module(name, nn.Linear(64, 64, device="meta"))
    model.block = nn.Module()
    model.block.head = nn.Linear(64, 64, device="meta")
    model.block.keep = nn.Sequential(nn.Linear(64, 64, device="meta"))
    pack_weights(model, ["head", "block.keep"], StepSetting(1, 1, quantization=Quantization("fp8")))
    packed = {name for name, module in model.named_modules() if "Packed" in type(module).__name__}
    assert packed == {"headless", "keep_a", "mlp"}


def test_states_of_optimizers() -> None:
    shape, dtype = (100, 4096), torch.float32
    assert [kind for kind in OPTIMIZERS if OPTIMIZERS[kind].temporaries == 8] == ["adagrad"]
    assert {kind for kind in OPTIMIZERS if OPTIMIZERS[kind].temporaries == 4} == {"adamw_torch", "rmsprop"}
    assert state_bytes("adamw_torch", shape, dtype) == (1_638_400, 1_638_400)
    assert state_bytes("sgd", shape, dtype) == ()
    assert state_bytes("adamw_8bit", shape, dtype) == (409_600, 409_600, 6_400, 6_400)
    assert sum(state_bytes("lorafa", (64, 8), dtype)) == 2 * 64 * 8 * 4


@pytest.mark.parametrize(
    ("rows", "width", "words", "chunk"),
    [
        (8, 64, 64, 8),
        (8, 64, 65, 4),
        (100, 64, 640, 16),
        (1, 64, 6400, 1),
        (9, 64, 64, 16),
        (1000, 8, 4096, 2),
    ],
)
def test_tokens_of_a_chunk_of_liger(rows: int, width: int, words: int, chunk: int) -> None:
    assert liger_chunk(rows, width, words) == chunk


# ---------------------------------------------------------------------------------- stand-ins


def test_answers_in_the_place_of_values() -> None:
    stand_ins = StandIns(padded=True, experts=3, images=5, logs=True)
    answer = stand_ins.answer
    mask = meta(6, 7, dtype=torch.bool)
    assert not answer(aten.all.default, (mask,), {})
    assert StandIns(padded=False, experts=None).answer(aten.all.default, (mask,), {})
    assert not answer(aten.any.default, (mask,), {})
    assert answer(aten._is_all_true.default, (mask,), {})
    assert answer(aten.histc.default, (meta(6),), {}).shape == (100,)
    assert answer(aten.histc.default, (meta(6), 9), {}).shape == (9,)
    assert answer(aten.nonzero.default, (mask,), {}).shape == (14, 2)
    assert answer(aten.nonzero.default, (meta(7, 5, dtype=torch.bool),), {}).shape == (12, 2)
    assert answer(aten.nonzero.default, (meta(7, dtype=torch.bool),), {}).shape == (7, 1)
    assert StandIns(padded=False, experts=None).answer(aten.nonzero.default, (mask,), {}).shape == (42, 2)
    assert answer(aten.masked_select.default, (meta(6, 7), mask), {}).shape == (42,)
    assert answer(aten.add.Tensor, (meta(6), meta(6)), {}) is None
    assert answer(aten.all.default, (torch.ones(3, dtype=torch.bool),), {}) is None


def test_a_number_that_is_asked_for() -> None:
    whole, number = meta(dtype=torch.long), meta()

    def asked(stand_ins: StandIns, *tensors: torch.Tensor) -> list[Any]:
        return [stand_ins.answer(aten._local_scalar_dense.default, (t,), {}) for t in tensors]

    mixture = StandIns(padded=False, experts=3)
    assert asked(mixture, whole, whole, whole, whole) == [0, 1, 2, 0]
    assert asked(mixture, meta(dtype=torch.bool), number) == [False, None]
    assert asked(StandIns(padded=False, experts=None), whole, number) == [None, None]
    logged = asked(StandIns(padded=False, experts=None, logs=True), whole, number)
    assert logged == [None, 0.0]


def test_counts_that_the_host_asks_for_are_those_of_images() -> None:
    stand_ins = StandIns(padded=False, experts=None, images=5)

    def copied(tensor: torch.Tensor, device: str) -> Any:
        return stand_ins.answer(aten._to_copy.default, (tensor,), {"device": torch.device(device)})

    assert copied(meta(2, dtype=torch.long), "cpu").tolist() == [5, 5]
    assert copied(meta(2, dtype=torch.long), "meta") is None
    assert copied(meta(2), "cpu") is None


def test_what_is_split_masked_and_grouped() -> None:
    assert [part.shape[0] for part in _split(meta(12, 2), [1, 1, 1])] == [4, 4, 4]
    assert _split(meta(12, 2), [4, 8]) is None
    assert _split(meta(12, 2), [1, 1, 1, 1, 1]) is None
    assert [part.shape[1] for part in _split(meta(2, 6), [1, 1], 1)] == [3, 3]
    mask = meta(3, 4, dtype=torch.bool)
    selected = _masked(meta(3, 4, 5), [mask])
    assert selected is not None
    assert selected.shape == (12, 5)
    assert _masked(meta(3, 4), [mask, mask]) is None
    assert _masked(meta(3, 4), [meta(3, dtype=torch.long)]) is None
    assert _masked(meta(3, 4), [None]) is None
    offsets = meta(4, dtype=torch.int32)
    grouped = _grouped_mm(meta(9, 5), meta(4, 5, 7), offsets)
    assert grouped is not None
    assert grouped.shape == (9, 7)
    of_weights = _grouped_mm(meta(5, 9), meta(9, 7), offsets)
    assert of_weights is not None
    assert of_weights.shape == (4, 5, 7)
    for left, right, offs in (
        (meta(9, 5, dtype=torch.bfloat16), meta(4, 5, 7), offsets),
        (meta(4, 9, 5), meta(4, 5, 7), offsets),
        (meta(9, 5), meta(4, 5, 7), None),
    ):
        assert _grouped_mm(left, right, offs) is None
    for targets in (meta(3, 4), meta(11)):
        losses, forward = _ctc_loss(meta(10, 3, 6), targets, meta(3), meta(3))
        assert losses.shape == (3,)
        assert forward.shape == (3, 10, 9)


def test_what_the_kernel_of_4_bits_unpacks() -> None:
    stand_ins = StandIns(padded=False, experts=None)
    func = stand_ins._gemm_4bit
    if func is None:
        pytest.skip("this bitsandbytes has no gemm_4bit")
    given = (meta(2, 5), meta(10), (7, 5), None, None, None, None)
    assert [tuple(t.shape) for _, t in stand_ins.held_by_the_kernel(func, given)] == [(7, 5)]
    scales = meta(9, dtype=torch.uint8)
    found = stand_ins.held_by_the_kernel(func, (*given, scales))
    assert [(tuple(t.shape), t.dtype) for _, t in found[1:]] == [((9,), torch.float32)] * 2
    assert stand_ins.held_by_the_kernel(func, (torch.ones(2, 5), *given[1:])) == []
    assert stand_ins.held_by_the_kernel(aten.mm.default, given) == []


def test_results_that_are_remembered_are_of_their_own() -> None:
    assert _is_of_its_own(meta(3, 4))
    assert _is_of_its_own(meta(3, 4).t())
    assert not _is_of_its_own(meta(3, 4)[:, :2])
    assert not _is_of_its_own(meta(3, 4)[1:])
    assert not _is_of_its_own(meta(3, 4)[:2])
    assert not _is_of_its_own(meta(0, 4))
    assert not _is_of_its_own(torch.ones(3))
    results = KnownResults(most=2)
    for rows in (3, 4, 5):
        assert results.run(aten.mm.default, (meta(rows, 2), meta(2, 6)), {}).shape == (rows, 6)
    assert len(results._known) == 1
    assert results.run(aten.mm.default, (meta(5, 2), meta(2, 6)), {}).shape == (5, 6)
    assert len(results._known) == 1
    assert results.run(aten.full.default, ([2], 1), {"device": "meta"}).dtype == torch.int64
    assert results.run(aten.full.default, ([2], 1.0), {"device": "meta"}).dtype == torch.float32


def vision(**fields: Any) -> Any:
    known = {"image_size": 56, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(**{**known, **fields})))


def test_images_of_a_batch() -> None:
    setting = StepSetting(2, 9, images=3)
    assert image_edges(SimpleNamespace(image_size=[4, 6]), setting) == (4, 6)
    assert image_edges(SimpleNamespace(), setting) == (448, 448)
    assert image_edges(SimpleNamespace(image_size=5), StepSetting(2, 9, image_size=8)) == (8, 8)
    taken = images_for(vision(), setting, {"image_grid_thw", "position_ids"})
    assert taken["image_grid_thw"].tolist() == [[1, 8, 8]] * 6
    assert taken["pixel_values"].shape == (6 * 64, 3 * 2 * 49)
    assert taken["position_ids"].shape == (3, 2, 9)
    small = images_for(vision(image_size=13, in_channels=1), setting, {"image_grid_thw"})
    assert small["image_grid_thw"].tolist() == [[1, 2, 2]] * 6
    assert small["pixel_values"].shape == (24, 98)
    plain = images_for(vision(), setting, {"pixel_attention_mask", "token_type_ids", "image_sizes"})
    assert plain["pixel_values"].shape == (2, 3, 3, 56, 56)
    assert plain["token_type_ids"].shape == (2, 9)
    assert "image_sizes" not in plain
    pixtral = images_for(vision(model_type="pixtral", num_channels=1), setting, {"image_sizes"})
    assert pixtral["image_sizes"].tolist() == [[56, 56]] * 6
    assert pixtral["pixel_values"].shape == (6, 1, 56, 56)
    assert set(images_for(vision(model_type="pixtral"), setting, ())) == {"pixel_values"}
