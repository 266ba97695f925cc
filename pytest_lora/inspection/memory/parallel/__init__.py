"""One rank of a step on several GPUs, by the name of its strategy.

The installed code of torch shards the model, and tensors stay without values.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.parallel.dtensors import cut_by_plan, fsdp2_rank, tensor_parallel_rank
from pytest_lora.inspection.memory.parallel.fsdp1 import fsdp1_rank
from pytest_lora.inspection.memory.parallel.placed import placed_rank, planned
from pytest_lora.inspection.memory.parallel.whole import ddp_rank, zero_rank

if TYPE_CHECKING:
    from torch import nn

    from pytest_lora.inspection.memory.meta_model import MetaModel

_RANKS = {
    "ddp": ddp_rank,
    "device_map": placed_rank,
    "fsdp1": fsdp1_rank,
    "fsdp2": fsdp2_rank,
    "hsdp": fsdp2_rank,
    "tp": tensor_parallel_rank,
    "zero1": zero_rank,
    "zero2": zero_rank,
    "zero3": zero_rank,
}


def autocasts(setting: StepSetting) -> bool:
    """Whether the forward runs under autocast: DeepSpeed casts the model instead (``Accelerator.__init__``)."""
    by_deepspeed = setting.parallel is not None and setting.parallel.strategy.startswith("zero")
    return bool(setting.autocast) and not by_deepspeed


def cuts_of(parallel: Parallel) -> tuple[Cut, ...]:
    """How layers may be cut, in the order in which that is tried.

    FSDP1 gathers the parameters of a layer while the second one after it goes backward. The last layer stays, as it
    prefetches nothing; the second one goes where it is like those above it. Over GPUs, layers are placed by all five.
    """
    usual = tuple(Cut(n) for n in ((2, 4, 0) if parallel.strategy == "fsdp1" else (1, 2, 4, 0)))
    return usual if parallel.strategy == "device_map" else (usual[0]._replace(before=1), *usual)


def plan_of(model: nn.Module, setting: StepSetting) -> dict[str, int] | None:
    """On which GPU each module of a whole base goes; None where all GPUs have the same."""
    if setting.parallel is None or setting.parallel.strategy != "device_map":
        return None
    return planned(model, setting, setting.parallel.gpus)


def before_adapters(model: nn.Module, setting: StepSetting) -> None:
    """What the way to share a step does to a base while it is loaded.

    Raises:
        ValueError: It cannot be done to this base; the message says why.
    """
    if setting.parallel is not None and setting.parallel.strategy == "tp":
        cut_by_plan(model, setting, setting.parallel.gpus)


def distributed(built: MetaModel, setting: StepSetting, parallel: Parallel) -> MetaModel:
    """The model with the part of the rank that holds most.

    Raises:
        ValueError: The strategy cannot shard this model; the message says why.
    """
    _require_classes(built, parallel)
    return replace(built, rank=_RANKS[parallel.strategy](built, setting, parallel))


def _require_classes(built: MetaModel, parallel: Parallel) -> None:
    known = sorted({type(module).__name__ for module in built.transformer.modules()})
    for name in parallel.wrap:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise ValueError(
                f"wrap: {type(built.transformer).__name__} has no module of class {name!r}{meant}"
            )
