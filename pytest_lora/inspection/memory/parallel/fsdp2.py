"""FSDP2: accelerate and torch shard the model themselves."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.parallel.model import (
    OFFLOAD_FORMULA,
    Rank,
    gradients_of,
    offloaded,
    shards,
    trained_shards,
)
from pytest_lora.inspection.memory.parallel.ranks import (
    fake_group,
    meta_as_device,
    outside,
    resizes_followed,
)
from pytest_lora.inspection.memory.storage_tracker import StorageTracker
from pytest_lora.inspection.memory.swapped import swapped
from pytest_lora.inspection.memory.weights import units_of

if TYPE_CHECKING:
    from pytest_lora.inspection.memory.meta_model import MetaModel

_DIVIDED, _REPEATED = "dp_shard", "dp_replicate"
"""Dimensions of the GPUs, as ``accelerate.ParallelismConfig`` calls them."""


def fsdp2_rank(built: MetaModel, setting: StepSetting, parallel: Parallel) -> Rank:
    """Shard a model as ``Trainer`` and accelerate do with ``fsdp_version: 2``."""
    prepare: Any = importlib.import_module("accelerate.utils.fsdp_utils").fsdp2_prepare_model
    # Its state is what accelerate loads; there are no values.
    without_state = swapped([(built.model, "state_dict", dict)])
    with fake_group(parallel.gpus), meta_as_device(), without_state:
        called = prepare(as_accelerator(setting, parallel), built.model)
        for module in _sharded(called):  # what is made for the first gathering is kept, and filled again
            module.unshard()
            module.reshard()
    unit_of = units_of(built.stacks)
    weights, trained = shards(called, built, unit_of), trained_shards(called, unit_of)
    if parallel.offload:
        weights, trained = offloaded(weights, trained)
    return Rank(
        called,
        trained,
        weights,
        built.stacks,
        _around,
        lambda: gradients_of(called),
        by_formula=(OFFLOAD_FORMULA,) if parallel.offload else (),
    )


def _sharded(called: torch.nn.Module) -> list[Any]:
    kind: Any = importlib.import_module("torch.distributed.fsdp").FSDPModule
    return [module for module in called.modules() if isinstance(module, kind)]


def as_accelerator(setting: StepSetting, parallel: Parallel) -> Any:
    """What ``fsdp2_prepare_model`` asks of an ``Accelerator``."""
    fsdp: Any = importlib.import_module("torch.distributed.fsdp")
    wrap: Any = importlib.import_module("torch.distributed.fsdp.wrap")
    mesh: Any = importlib.import_module("torch.distributed.device_mesh")
    policy = fsdp.MixedPrecisionPolicy()
    if setting.autocast:  # FullyShardedDataParallelPlugin.set_mixed_precision
        dtype = getattr(torch, setting.autocast)
        policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)
    plugin = SimpleNamespace(
        set_auto_wrap_policy=lambda model: None,
        auto_wrap_policy=wrap.transformer_auto_wrap_policy,
        transformer_cls_names_to_wrap=list(parallel.wrap) or None,
        reshard_after_forward=parallel.reshard_after_forward,
        mixed_precision_policy=policy,
        cpu_offload=None,
        ignored_modules=None,
        cpu_ram_efficient_loading=False,
    )
    size = parallel.shard_size or parallel.gpus
    grouped = bool(parallel.shard_size)
    sizes = (parallel.gpus // size, size) if grouped else (size,)
    names = (_REPEATED, _DIVIDED) if grouped else (_DIVIDED,)
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={names: mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names)},
        parallelism_config=SimpleNamespace(fsdp_dim_names=names),
        mixed_precision=setting.autocast or "no",
        is_main_process=False,
    )


@contextmanager
def _around(tracker: StorageTracker) -> Iterator[None]:
    collectives: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    mixin = collectives.DefaultAllocMixin
    allocate = mixin.allocate

    def allocated(self: Any, *size: Any, **how: Any) -> torch.Tensor:
        made: torch.Tensor = allocate(self, *size, **how)
        gathers = "AllGather" in type(self).__name__
        tracker.recategorize(made, "gathered parameters" if gathers else "reduce buffers")
        return made

    state: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_state").FSDPState
    replaced = [
        (mixin, "allocate", allocated),
        outside(tracker, state, "_root_post_backward_final_callback"),
    ]
    with meta_as_device(), resizes_followed(tracker), swapped(replaced):
        yield
