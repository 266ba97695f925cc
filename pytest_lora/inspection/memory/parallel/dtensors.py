"""Strategies that cut parameters into torch's DTensors: FSDP2 by accelerate, tensor parallelism by transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.meta_answers import swapped
from pytest_lora.inspection.memory.parallel.model import (
    OFFLOAD_FORMULA,
    Rank,
    gradients_of,
    offloaded,
    shards,
    trained_shards,
    units_of,
)
from pytest_lora.inspection.memory.parallel.ranks import (
    fake_group,
    meta_as_device,
    outside,
    resizes_followed,
)
from pytest_lora.inspection.memory.storage_tracker import StorageTracker

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
        _around_of_fsdp2,
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
def _around_of_fsdp2(tracker: StorageTracker) -> Iterator[None]:
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


def cut_by_plan(model: nn.Module, setting: StepSetting, gpus: int) -> None:
    """Cut the weights of a base without adapters by its plan, for the first of so many GPUs.

    Raises:
        ValueError: The base has no plan, is quantized, or the installed transformers cannot cut it.
    """
    name = type(model).__name__
    if setting.quantization is not None:
        raise ValueError("strategy: tp of a quantized base is not known; write quantization=None")
    try:
        styles: Any = importlib.import_module("transformers.distributed.tensor_parallel")
        apply, config_class = styles.apply_tensor_parallelism, _distributed_config()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            "strategy: tp needs a transformers that cuts models into DTensors (5.17 or later), and a PEFT for it"
        ) from error
    cut: Any = model
    mesh: Any = importlib.import_module("torch.distributed.device_mesh")
    _require_heads(cut, gpus)
    with fake_group(gpus), meta_as_device():
        config = config_class(tp_size=gpus)
        try:
            plan = cut._resolve_parallel_plans(config)[0]
        except ValueError as error:
            raise ValueError(
                f"strategy: transformers has no plan of tensor parallelism for {name}: {error}"
            ) from error
        cut._device_mesh = mesh.init_device_mesh("cpu", (gpus,), mesh_dim_names=("tp",))
        cut.config.distributed_config = config
        apply(cut, cut._device_mesh, plan)


def _distributed_config() -> Any:
    return importlib.import_module("transformers").DistributedConfig


def _require_heads(model: Any, gpus: int) -> None:
    """Each GPU gets whole heads, of the queries and of the keys."""
    config = getattr(model.config, "text_config", model.config)
    for heads in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, heads, None)
        if isinstance(count, int) and count % gpus:
            raise ValueError(
                f"gpus: tp gives each GPU whole heads, and {gpus} GPUs do not divide {heads}={count}"
            )


def tensor_parallel_rank(built: MetaModel, setting: StepSetting, parallel: Parallel) -> Rank:
    """One GPU of a model that is cut; every GPU sees the whole batch."""
    _mend_widths(built.model)
    unit_of = units_of(built.stacks)
    return Rank(
        built.model,
        trained_shards(built.model, unit_of),
        shards(built.model, built, unit_of),
        built.stacks,
        partial(_around_of_plan, parallel.gpus),
        lambda: gradients_of(built.model),
        first_differs=True,
    )


def _mend_widths(model: nn.Module) -> None:
    """Let factors say their whole widths.

    PEFT 0.21 gives those of a cut layer the widths of a part, and transformers since 5.22 takes them for the whole.
    """
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if "lora_" in name and isinstance(module, nn.Linear) and hasattr(weight, "_local_tensor"):
            module.out_features, module.in_features = weight.shape


@contextmanager
def _around_of_plan(gpus: int, tracker: StorageTracker) -> Iterator[None]:
    with fake_group(gpus), meta_as_device():
        yield
