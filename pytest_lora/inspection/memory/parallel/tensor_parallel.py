"""Tensor parallelism: transformers cuts each layer by the model's own plan, as ``tp_plan="auto"`` does."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.parallel.model import Rank, gradients_of, shards, trained_shards
from pytest_lora.inspection.memory.parallel.ranks import fake_group, meta_as_device
from pytest_lora.inspection.memory.storage_tracker import StorageTracker
from pytest_lora.inspection.memory.weights import units_of

if TYPE_CHECKING:
    from pytest_lora.inspection.memory.meta_model import MetaModel


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
        partial(_around, parallel.gpus),
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
def _around(gpus: int, tracker: StorageTracker) -> Iterator[None]:
    with fake_group(gpus), meta_as_device():
        yield
