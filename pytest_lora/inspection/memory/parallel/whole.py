"""Strategies that leave every weight on every GPU while it is used: DDP and ZeRO, by formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.parallel.model import (
    Loading,
    Rank,
    Trained,
    Weight,
    loaded_weights,
    nothing_around,
)
from pytest_lora.inspection.memory.parallel.zero3 import Gathered, Limits, Part, gathered, zero3_linears
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE, StorageTracker

if TYPE_CHECKING:
    from torch import nn

    from pytest_lora.inspection.memory.meta_model import MetaModel

_HALF, _FLOAT = 2, 4

REDUCE_BUCKET = 500_000_000
"""Numbers in the buffer that gradients are reduced from, ``reduce_bucket_size`` (deepspeed/runtime/zero/config.py)."""

PREFETCH_BUCKET = 50_000_000
"""Numbers that ZeRO-3 gathers ahead, ``stage3_prefetch_bucket_size``."""

PERSISTENT_UP_TO = 100_000
"""Numbers up to which ZeRO-3 keeps a parameter whole, ``stage3_param_persistence_threshold``."""

REUSE_DISTANCE = 1_000_000_000
"""Numbers within which a parameter that is used again stays, ``stage3_max_reuse_distance``; no more than
``stage3_max_live_parameters`` are whole at once, which has the same default."""


def ddp_rank(built: MetaModel, setting: StepSetting, parallel: Parallel) -> Rank:
    """Gradients in buckets beside the gradients, or as views of them (torch/csrc/distributed/c10d/reducer.cpp)."""
    trained = built.trained()
    buckets = [Weight(t.numel * t.dtype.itemsize, "buckets", t.unit) for t in trained]
    views = bool(parallel.option("gradient_as_bucket_view", False))
    return Rank(
        built.model,
        trained,
        [*built.weights, *buckets],
        built.stacks,
        _reduced_at_once(built.model) if views else nothing_around,
        by_formula=("buckets of DistributedDataParallel, as large as all gradients",),
        notices_gradients=not views,
    )


def zero_rank(built: MetaModel, setting: StepSetting, parallel: Parallel) -> Rank:
    """ZeRO-1, 2 and 3 of DeepSpeed (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py).

    With mixed precision the engine holds the adapter in 16 bits, and a float32 copy of each rank's part for the
    optimizer; there is no autocast.
    """
    stage = int(parallel.strategy[-1])
    if setting.autocast:
        _cast(built.model, getattr(torch, setting.autocast))
    half = bool(setting.autocast)
    weights = loaded_weights(built.model, built.unit_of)
    parts = [
        Trained((_part(t.numel, parallel.gpus),), torch.float32 if half else t.dtype, t.unit)
        for t in built.trained()
    ]
    held, apart = weights, 0
    if stage == 3:
        small = _number(parallel, "stage3_param_persistence_threshold", PERSISTENT_UP_TO, 10 * _width(built))
        whole = _gathered(built, setting, parallel, small)
        held = [*_divided(built, parallel, small), Weight(whole.allocated, "gathered parameters", OUTSIDE)]
        apart = whole.reserved - whole.allocated
    # What the engine keeps of each rank's part: gradients in the precision of the model, weights in float32.
    kind = _HALF if half else _FLOAT
    if parallel.offload is None:
        held = [*held, *(Weight(p.numel * _FLOAT, "optimizer", p.unit) for p in parts if half)]
    if stage > 1 and parallel.offload is None:
        held = [*held, *(Weight(p.numel * kind, "gradients", p.unit) for p in parts)]
    contiguous = parallel.option("contiguous_gradients", True) or (stage < 3 and parallel.offload is not None)
    buffers = int(contiguous) + int(bool(parallel.option("overlap_comm", False)) and stage < 3)
    bucket = _number(parallel, "reduce_bucket_size", REDUCE_BUCKET, _width(built) ** 2) * kind
    held = [*held, *(Weight(bucket, "reduce buffers", OUTSIDE) for _ in range(buffers))]
    return Rank(
        built.model,
        [] if parallel.offload else parts,
        held,
        built.stacks,
        _around_of_zero(built.model, stage, parallel),
        by_formula=(
            f"partitions, buckets{' and gathered parameters' if stage == 3 else ''} of ZeRO-{stage}, with DeepSpeed's "
            "defaults where nothing else is given",
        ),
        notices_gradients=stage == 1,
        loading=_whole_at_first(built, parallel) if stage == 3 and setting.quantization else None,
        apart=apart,
    )


def _whole_at_first(built: MetaModel, parallel: Parallel) -> Loading:
    """A quantized model, which each GPU has as a whole before DeepSpeed divides it.

    transformers leaves ``zero.Init`` out for it (``PreTrainedModel.get_init_context``), and the engine then moves all
    of it (``DeepSpeedEngine._configure_distributed_model``), with ``offload="cpu"`` too. Trained parts are put together
    afterwards, for which the cache is emptied (``defragment`` in stage3.py).
    """
    found = Loading(
        [], [], [], ("gathered parameters", "reduce buffers", "optimizer", "gradients"), emptied=True
    )

    def make(size: int, unit: int) -> int:
        found.sizes.append(size)
        found.events.append(len(found.sizes) - 1)
        found.units.append(unit)
        return found.events[-1]

    whole = [
        (parameter, unit := built.unit_of.get(id(parameter), OUTSIDE), make(_bytes(parameter), unit))
        for parameter in built.model.parameters()
    ]
    for parameter, unit, made in whole:
        if parallel.offload != "cpu":
            make(_part(parameter.numel(), parallel.gpus) * parameter.dtype.itemsize, unit)
        found.events.append(~made)
        found.units.append(unit)
    return found


def _bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.dtype.itemsize


def _part(numel: int, gpus: int) -> int:
    return math.ceil(numel / gpus)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """``DeepSpeedEngine._configure_distributed_model``."""
    for parameter in model.parameters():
        # Packed weights have a dtype that packs them.
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)


def _divided(built: MetaModel, parallel: Parallel, small: int) -> Iterator[Weight]:
    """Weights under ZeRO-3: each rank's part, and small ones whole as well."""
    statistics = (w for w in built.weights if w.category == "quantization statistics")
    yield from statistics
    yield from (
        Weight(b.untyped_storage().nbytes(), "base weights", built.unit_of.get(id(b), OUTSIDE))
        for b in built.model.buffers()
        if b.is_meta
    )
    for parameter in built.model.parameters():
        numel, width = parameter.numel(), parameter.dtype.itemsize
        unit = built.unit_of.get(id(parameter), OUTSIDE)
        category = "adapters" if parameter.requires_grad else "parameter shards"
        if parallel.offload != "cpu":
            yield Weight(_part(numel, parallel.gpus) * width, category, unit)
        if numel <= small:
            yield Weight(numel * width, "gathered parameters", unit)


def _width(built: MetaModel) -> int:
    """What Trainer puts for "auto" is a multiple of it (``transformers.integrations.deepspeed``)."""
    config: Any = built.transformer.config
    return int(getattr(getattr(config, "text_config", config), "hidden_size", 0) or 0)


def _number(parallel: Parallel, name: str, default: int, auto: int) -> int:
    given = parallel.option(name, default)
    return auto if given == "auto" and auto else default if given == "auto" else int(float(given))


def _gathered(built: MetaModel, setting: StepSetting, parallel: Parallel, small: int) -> Gathered:
    """What is whole at once of the frozen parameters, and of those of one layer that are trained."""
    reuse, live = (
        _number(parallel, name, REUSE_DISTANCE, REUSE_DISTANCE)
        for name in ("stage3_max_reuse_distance", "stage3_max_live_parameters")
    )
    ahead = _number(parallel, "stage3_prefetch_bucket_size", PREFETCH_BUCKET, int(0.9 * _width(built) ** 2))
    units: list[list[list[Part]]] = []
    again: list[bool] = []
    trained: dict[int, int] = {}
    for unit, modules in groupby(_modules(built, small), key=lambda module: module[0]):
        parameters = [own for _, own in modules]
        layer = [
            [Part(p.numel(), p.dtype.itemsize) for p in own if not p.requires_grad] for own in parameters
        ]
        numbers = sum(part.numel for module in layer for part in module)
        # More layers than those that are whole before and after a turn change nothing.
        times = min(built.copies_of(unit), 4 + 3 * reuse // max(1, numbers))
        units += [layer] * times
        again += [bool(setting.gradient_checkpointing) and unit != OUTSIDE] * times
        trained[unit] = sum(_bytes(p) for own in parameters for p in own if p.requires_grad)
    frozen = gathered(units, again, Limits(ahead, reuse, live))
    return Gathered(*(size + max(trained.values(), default=0) for size in frozen))


def _modules(built: MetaModel, small: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """The unit and the parameters of each module that has some which are divided, in the order of the model."""
    seen: set[int] = set()
    for module in built.model.modules():
        own: list[torch.Tensor] = [
            p for p in module.parameters(recurse=False) if p.numel() > small and id(p) not in seen
        ]
        seen.update(map(id, own))
        if own:
            yield built.unit_of.get(id(own[0]), OUTSIDE), own


def _around_of_zero(
    model: nn.Module, stage: int, parallel: Parallel
) -> Callable[[StorageTracker], AbstractContextManager[None]]:
    if stage == 1:
        return nothing_around
    reduced = _reduced_at_once(model)
    if stage == 2 or not parallel.option("memory_efficient_linear", True):
        return reduced

    @contextmanager
    def around(tracker: StorageTracker) -> Iterator[None]:
        with reduced(tracker), zero3_linears():
            yield

    return around


def _reduced_at_once(model: nn.Module) -> Callable[[StorageTracker], AbstractContextManager[None]]:
    """Each gradient goes into a buffer, and is freed, once it is whole."""

    @contextmanager
    def around(tracker: StorageTracker) -> Iterator[None]:
        def reduce(parameter: torch.Tensor) -> None:
            parameter.grad = None

        trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(reduce) for parameter in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return around
