"""``device_map="auto"``: whole layers on one GPU after the other, where accelerate's own planner places them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.base import embeddings_of
from pytest_lora.inspection.memory.layer_stacks import Stack
from pytest_lora.inspection.memory.parallel.model import Rank, nothing_around
from pytest_lora.inspection.transformers_internals import kept_whole

if TYPE_CHECKING:
    from pytest_lora.inspection.memory.meta_model import MetaModel

_PLENTY = 2**50
"""Bytes of each GPU for the planner, which then balances; how much there really is decides whether the step fits."""

_FORMULA = (
    "storages are given to the GPU of the layer that makes them; hidden states and logits that accelerate moves to "
    "another GPU are not counted"
)


@dataclass(frozen=True)
class Placement:
    """On which GPU everything lies.

    Attributes:
        gpus: How many there are.
        layers: By stack, the GPU of each unit of the whole model.
        first, last: The GPUs of what comes before the layers (embeddings), and after them (the head).
    """

    gpus: int
    layers: tuple[tuple[int, ...], ...]
    first: int
    last: int


def planned(model: nn.Module, setting: StepSetting, gpus: int) -> dict[str, int]:
    """The GPU of every module that is placed as a whole, by name, as ``from_pretrained(device_map="auto")`` plans it.

    Args:
        model: The base with all its layers, neither quantized nor adapted.
        setting: Its quantization and dtype.
        gpus: How many.
    """
    planner: Any = importlib.import_module("accelerate.utils")
    base: Any = model
    whole = dict.fromkeys(_whole(base, setting), getattr(torch, setting.dtype))
    sizes = {
        "no_split_module_classes": list(base._no_split_modules or ()),
        "dtype": _stored(planner, setting),
        "special_dtypes": whole,
    }
    memory = dict.fromkeys(range(gpus), _PLENTY)
    balanced = planner.get_balanced_memory(base, max_memory=memory, **sizes)
    if setting.quantization is not None and setting.quantization.by_bitsandbytes:
        # Bnb4BitHfQuantizer.adjust_max_memory leaves room for quantizing.
        balanced = {gpu: int(size * 0.9) for gpu, size in balanced.items()}
    found: dict[str, int] = planner.infer_auto_device_map(base, max_memory=balanced, **sizes)
    return found


def _whole(base: Any, setting: StepSetting) -> list[str]:
    """The weights that are not quantized, by name; none where nothing is."""
    if setting.quantization is None:
        return []
    skipped = kept_whole(base, list(setting.quantization.skip_modules) or None)
    packed = {
        f"{name}.weight"
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in skipped)
    }
    return [name for name, _ in base.named_parameters() if name not in packed]


def _stored(planner: Any, setting: StepSetting) -> Any:
    if setting.quantization is None:
        return getattr(torch, setting.dtype)
    eight = setting.quantization.method in ("int8", "fp8")
    return torch.int8 if eight else planner.CustomDtype.INT4


def placed_rank(built: MetaModel, setting: StepSetting, parallel: Parallel) -> Rank:
    """All layers, each on its GPU; the figures are those of the fullest.

    Raises:
        ValueError: The base has no run of like layers long enough to follow.
    """
    if not built.stacks or built.plan is None:
        raise ValueError(
            "strategy: device_map is followed by layers that are alike, six or more in a row, and this base with this "
            "adapter has none"
        )
    names = {id(module): name for name, module in built.transformer.named_modules()}
    base: Any = built.transformer
    first, head = embeddings_of(base, "input"), embeddings_of(base, "output")
    return Rank(
        built.model,
        built.trained(),
        built.weights,
        built.stacks,
        nothing_around,
        by_formula=(_FORMULA,),
        notices_gradients=True,
        placement=Placement(
            parallel.gpus,
            tuple(tuple(_of_units(stack, names, built.plan)) for stack in built.stacks),
            _gpu_of(names.get(id(first), ""), built.plan),
            _gpu_of(names.get(id(head), ""), built.plan),
        ),
    )


def _of_units(stack: Stack, names: dict[int, str], plan: dict[str, int]) -> list[int]:
    parent, _, start = names[id(stack.units[0][0])].rpartition(".")
    period = len(stack.units[0])
    units = range(stack.copies + len(stack.units) - 2)
    return [_gpu_of(f"{parent}.{int(start) + unit * period}", plan) for unit in units]


def _gpu_of(name: str, plan: dict[str, int]) -> int:
    """That of the module, or of the one that holds it, or of its first part that is placed."""
    while name and name not in plan:
        parts = [gpu for placed, gpu in plan.items() if placed.startswith(f"{name}.")]
        if parts:
            return parts[0]
        name = name.rpartition(".")[0]
    return plan.get(name, max(plan.values()))


def moved_between_gpus(config: Any, setting: StepSetting) -> int:
    """Bytes of the logits and of hidden states with their gradient in float32, and of a workspace of cuBLAS."""
    text = getattr(config, "text_config", config)
    numbers = (getattr(text, "vocab_size", None) or 0) + 2 * (getattr(text, "hidden_size", None) or 0)
    return 4 * numbers * setting.batch_size * setting.seq_len + setting.workspace
