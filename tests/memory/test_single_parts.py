"""Single parts of a prediction: what torch, accelerate, bitsandbytes or plain Python say of them."""

from __future__ import annotations

from bisect import bisect_left
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from pytest_lora.facts.memory import AMPERE_WORKSPACE, Quantization, StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory import batches, unmodelled
from pytest_lora.inspection.memory.batches import batch_for
from pytest_lora.inspection.memory.cuda_allocator import _bisect_left
from pytest_lora.inspection.memory.estimate import StepShape
from pytest_lora.inspection.memory.layer_stacks import Stack
from pytest_lora.inspection.memory.live_model import _attention, _workspace
from pytest_lora.inspection.memory.parallel import placed
from pytest_lora.inspection.memory.parallel.fsdp1 import _policy, _remedy
from pytest_lora.inspection.memory.parallel.model import Trained, Weight, offloaded
from pytest_lora.inspection.memory.parallel.placed import Placement, _of_units, placed_rank, planned
from pytest_lora.inspection.memory.parallel.whole import PERSISTENT_UP_TO, _cast, _divided
from pytest_lora.inspection.memory.step import Step
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE
from tests.memory.test_batches import model, shapes


@given(st.lists(st.integers(-5, 5)).map(sorted), st.integers(-6, 6))
def test_the_search_that_numba_compiles_is_bisect(ordered: list[int], sought: int) -> None:
    assert _bisect_left(None, None)(ordered, sought) == bisect_left(ordered, sought)


# ----------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_a_mask_is_there_where_the_collator_or_the_library_gives_one(
    monkeypatch: pytest.MonkeyPatch, ones: bool, padding: bool
) -> None:
    monkeypatch.setattr(batches, "masks_where_nothing_is_masked", lambda: ones)
    setting = StepSetting(2, 12, padding_mask=padding)
    assert ("attention_mask" in batch_for(model("OwnForCausalLM"), setting)) is (ones or padding)
    assert ("attention_mask" in batch_for(model("OwnForCausalLM", takes="input_ids"), setting)) is padding
    seen = model("OwnForImageClassification", "pixel_values", "pixel_values, attention_mask", image_size=4)
    assert "attention_mask" not in batch_for(seen, setting)


@pytest.mark.parametrize("takes", ["input_ids", "input_ids, pixel_values"])
@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("images", [2, 0])
def test_images_beside_text_need_a_tower_an_argument_and_a_library_that_runs_them(
    monkeypatch: pytest.MonkeyPatch, takes: str, tower: bool, runs: bool, images: int
) -> None:
    monkeypatch.setattr(batches, "reads_images", lambda read: tower)
    monkeypatch.setattr(batches, "runs_images_without_values", lambda: runs)
    monkeypatch.setattr(batches, "images_for", lambda *given: {"pixel_values": torch.empty(images, 3)})
    found = batch_for(model("OwnForVision", takes=takes), StepSetting(1, 4, images=images))
    assert ("pixel_values" in found) is ("pixel_values" in takes and tower and runs and images > 0)


def test_without_padding_all_texts_stand_in_one_row() -> None:
    setting = StepSetting(3, 12, padding_free=True)
    found = batch_for(model("OwnForCausalLM", takes="input_ids, position_ids, labels"), setting)
    assert shapes(found) == {"input_ids": (1, 36), "labels": (1, 36), "position_ids": (1, 36)}
    assert shapes(batch_for(model("OwnForCausalLM", takes="input_ids"), setting)) == {"input_ids": (1, 36)}
    seen = model("OwnForImageClassification", "pixel_values", "pixel_values", image_size=4)
    assert shapes(batch_for(seen, setting)) == {"pixel_values": (3, 3, 4, 4), "labels": (3,)}


def test_samples_need_convolutions_and_convolutions_samples() -> None:
    for main, config in (("input_values", {}), ("molecules", {"conv_kernel": [2], "conv_stride": [2]})):
        with pytest.raises(ValueError, match=f"its main input is '{main}'"):
            batch_for(model("OwnModel", main, main, **config), StepSetting(1, 4))


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("images", [1, 0])
def test_images_are_left_out_where_the_library_compares_their_values(
    monkeypatch: pytest.MonkeyPatch, runs: bool, images: int
) -> None:
    monkeypatch.setattr(unmodelled, "runs_images_without_values", lambda: runs)
    monkeypatch.setattr(unmodelled, "reads_images", lambda read: True)
    found = unmodelled.of_setting(StepSetting(1, 1, images=images), nn.Module(), {})
    assert any(one.what.startswith("images") for one in found) is (bool(images) and not runs)


# ------------------------------------------------------------------------ several GPUs: FSDP1


@pytest.mark.parametrize(
    ("storage", "prepared", "said"),
    [
        ("uint8", False, "bnb_4bit_quant_storage='bfloat16'"),
        ("uint8", True, "bnb_4bit_quant_storage='bfloat16'"),
        ("bfloat16", True, "prepare_for_kbit=False"),
        ("bfloat16", False, ""),
        (None, True, "prepare_for_kbit=False"),
        (None, False, ""),
    ],
)
def test_what_to_write_where_fsdp1_finds_several_dtypes(
    storage: str | None, prepared: bool, said: str
) -> None:
    packed = None if storage is None else Quantization("nf4", storage=storage)
    found = _remedy(
        StepSetting(1, 1, dtype="bfloat16", quantization=packed, prepare_for_kbit=prepared, autocast=None)
    )
    assert said in found
    assert bool(found) is bool(said)


def test_classes_that_are_named_and_trained_parts_are_wrapped_each() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    holder: Any = nn.ModuleList([layer, nn.Linear(2, 2).requires_grad_(False)])
    holder.weight = nn.Parameter(torch.zeros(1))
    policy = _policy(nn.Sequential(layer, holder), Parallel(2, "fsdp1", wrap=("Sequential",)))

    def wraps(module: nn.Module) -> bool:
        return bool(policy(module=module, recurse=False, nonwrapped_numel=0))

    assert wraps(layer)
    assert wraps(layer[0])
    assert not wraps(layer[1])
    assert not wraps(holder)  # what is trained in it is not it alone
    assert not wraps(holder[1])


# ------------------------------------------------------------------- several GPUs: device_map


class Planner:
    """Stands in for accelerate's, and notes what it is asked."""

    CustomDtype = SimpleNamespace(INT4="int4")

    def get_balanced_memory(self, base: Any, max_memory: dict[int, int], **sizes: Any) -> dict[int, int]:
        self.balanced = max_memory, sizes
        return {0: 1001, 1: 2003}

    def infer_auto_device_map(self, base: Any, max_memory: dict[int, int], **sizes: Any) -> dict[str, int]:
        self.inferred = max_memory, sizes
        return {"": 1}


@pytest.mark.parametrize("method", [None, "nf4", "gptq"])
def test_the_planner_is_asked_as_transformers_asks_it(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    planner = Planner()
    monkeypatch.setattr(placed.importlib, "import_module", lambda name: planner)
    base: Any = nn.Module()
    base.inner, base.lm_head, base._no_split_modules = nn.Linear(2, 2), nn.Linear(2, 2), {"Layer"}
    monkeypatch.setattr(placed, "kept_whole", lambda base, skipped: ["lm_head"])
    setting = StepSetting(1, 1, dtype="float16", quantization=method and Quantization(method))
    assert planned(base, setting, 2) == {"": 1}
    (room, sizes), (kept, again) = planner.balanced, planner.inferred
    assert sizes == again
    assert sizes["no_split_module_classes"] == ["Layer"]
    assert set(room) == {0, 1}
    assert min(room.values()) >= 2**50 > 1000 * 80 * 2**30
    whole = dict.fromkeys(("inner.bias", "lm_head.weight", "lm_head.bias"), torch.float16)
    assert sizes["special_dtypes"] == (whole if method else {})
    quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True))
    left = {0: 1001, 1: 2003}
    if method == "nf4":
        left = {gpu: int(size) for gpu, size in quantizer.adjust_max_memory(left).items()}
    assert kept == left
    base._no_split_modules = None
    planned(base, setting, 2)
    assert planner.balanced[1]["no_split_module_classes"] == []


def test_units_of_the_whole_model_are_where_the_plan_puts_them() -> None:
    # Seven units of two layers behind one that stands alone; five units are kept.
    layers = nn.ModuleList(nn.Identity() for _ in range(15))
    kept = [1, 2, 3, 4, 5, 6, 11, 12, 13, 14]
    units = tuple((layers[a], layers[b]) for a, b in zip(kept[::2], kept[1::2], strict=True))
    names = {id(layer): f"model.layers.{i}" for i, layer in enumerate(layers)}
    plan = {f"model.layers.{i}": i // 5 for i in range(15)}
    assert _of_units(Stack(units, 4, 0), names, plan) == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("field", ["stacks", "plan"])
def test_a_base_that_cannot_be_followed_over_gpus_is_refused(field: str) -> None:
    built: Any = SimpleNamespace(stacks=[object()], plan={"": 0})
    setattr(built, field, None)
    with pytest.raises(ValueError, match="device_map is followed by layers that are alike"):
        placed_rank(built, StepSetting(1, 1), Parallel(2, "device_map"))


# --------------------------------------------------------------------- several GPUs: offload, ZeRO


def test_of_offloaded_parts_the_largest_unit_is_gathered() -> None:
    parts = [
        Weight(5, "parameter shards", 1),
        Weight(4, "adapters", 1),
        Weight(8, "parameter shards", 2),
        Weight(3, "base weights", 2),
    ]
    trained = [Trained((2,), torch.float32, 1)]
    kept = Weight(3, "base weights", 2)
    assert offloaded(parts, trained) == ([kept, Weight(9, "gathered parameters", OUTSIDE)], [])
    assert offloaded([kept], trained) == ([kept, Weight(0, "gathered parameters", OUTSIDE)], [])


def test_deepspeed_casts_numbers_and_no_packed_weights() -> None:
    held: Any = nn.Module()
    held.weight = nn.Parameter(torch.ones(1))
    held.packed = nn.Parameter(torch.ones(1), requires_grad=False)
    held.packed.quant_state = object()
    held.whole = nn.Parameter(torch.ones(1, dtype=torch.uint8), requires_grad=False)
    held.bytes = nn.Parameter(torch.ones(1, dtype=torch.uint8), requires_grad=False)
    held.bytes.quant_state = object()
    _cast(held, torch.bfloat16)
    found = {name: parameter.dtype for name, parameter in held.named_parameters()}
    assert found == {
        "weight": torch.bfloat16,
        "packed": torch.float32,
        "whole": torch.uint8,
        "bytes": torch.uint8,
    }


def test_zero_3_keeps_up_to_a_hundred_thousand_numbers_whole() -> None:
    """``stage3_param_persistence_threshold`` of DeepSpeed's documentation, 1e5."""
    held: Any = nn.Module()
    held.small, held.large = (nn.Parameter(torch.empty(n, device="meta")) for n in (100_000, 100_001))
    built: Any = SimpleNamespace(
        model=held,
        weights=[],
        unit_of={},
    )
    found = [*_divided(built, Parallel(2, "zero3"), PERSISTENT_UP_TO)]
    assert found == [
        Weight(50_000 * 4, "adapters", OUTSIDE),
        Weight(100_000 * 4, "gathered parameters", OUTSIDE),
        Weight(50_001 * 4, "adapters", OUTSIDE),
    ]


def test_each_gpu_of_a_device_map_has_its_own_peak() -> None:
    """Two layers on a GPU each: what the second one makes does not count on the first."""
    step = Step(placement=Placement(2, ((0, 1),), first=0, last=1), copies={0: 0})
    weights = [step.make(512 * size, "base weights", "load", "load", unit) for size, unit in ((3, 0), (4, 1))]
    step.loaded = step.first = len(step.events)
    hidden = [step.make(512 * size, "activations", "mm", "forward", unit) for size, unit in ((5, 0), (1, 1))]
    logits = step.make(512 * 2, "logits and loss", "mm", "forward", -1)
    step.free(logits, "backward", -1)
    back = step.make(512 * 9, "gradients", "mm", "backward", 1)
    for storage, unit in ((hidden[1], 1), (back, 1), (hidden[0], 0)):
        step.free(storage, "backward", unit)
    step.trained = len(step.events)
    shape = StepShape(step)
    sizes = np.array(step.sizes)
    assert weights == [0, 1]
    first, second = 512 * (3 + 5), 512 * (4 + 1 + 9)
    assert shape.peak_allocated(sizes) == second
    assert shape.over_gpus(sizes, 2) == first + second
    assert (shape.figures(sizes).training_peak, shape.figures(sizes).evaluation_peak) == (second, 0)
    assert shape.figures(sizes).breakdown == {
        "base weights": 512 * 4,
        "activations": 512,
        "gradients": 512 * 9,
    }


# --------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("architecture", "workspace"),
    [("gfx942:sramecc+:xnack-", 128), ("gfx950", 128), ("gfx90a", 32), ("gfx1100", 32), ("", 32)],
)
def test_workspaces_on_gpus_of_amd(
    monkeypatch: pytest.MonkeyPatch, architecture: str, workspace: int
) -> None:
    monkeypatch.delattr(torch.backends.cuda, "cublas_workspace_size", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    found = _workspace(SimpleNamespace(gcnArchName=architecture, major=9, minor=4))
    assert found == workspace * 2**20
    monkeypatch.setattr(torch.version, "hip", None)
    assert _workspace(SimpleNamespace(major=9, minor=4)) == AMPERE_WORKSPACE
    assert _workspace(SimpleNamespace(major=9, minor=0)) == 32 * 2**20
    assert _workspace(SimpleNamespace(major=8, minor=0)) == AMPERE_WORKSPACE


def test_torch_is_asked_for_causal_attention_over_heads_of_64_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, **how: asked.append((given, how)) or 1)
    assert _attention("cpu") == "flash"
    ((query, key, value), how) = asked[0]
    assert query is key is value
    assert (query.dtype, query.shape[-1], how) == (torch.bfloat16, 64, {"is_causal": True})
