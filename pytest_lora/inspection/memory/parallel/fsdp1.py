"""FSDP1: torch flattens and shards the model itself."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.layer_stacks import Stack
from pytest_lora.inspection.memory.meta_answers import StandIns, swapped
from pytest_lora.inspection.memory.parallel.model import (
    OFFLOAD_FORMULA,
    Loading,
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
from pytest_lora.inspection.memory.storage_tracker import OUTSIDE, StorageTracker
from pytest_lora.inspection.quiet import collector

if TYPE_CHECKING:
    from pytest_lora.inspection.memory.meta_model import MetaModel

_HOME = "torch.distributed.fsdp.fully_sharded_data_parallel"


def fsdp1_rank(built: MetaModel, setting: StepSetting, parallel: Parallel) -> Rank:
    """Flatten and shard a model as ``Trainer`` and accelerate do with ``fsdp_version: 1``."""
    fsdp: Any = importlib.import_module("torch.distributed.fsdp")
    kind = fsdp.FullyShardedDataParallel
    if setting.autocast:
        _train_in_float32(built.model)
    with fake_group(parallel.gpus), meta_as_device():
        arguments = _arguments(fsdp, built, setting, parallel)
        try:
            with cutting_followed(built.model, built.unit_of, offloaded=bool(parallel.offload)) as loading:
                called = kind(built.model, **arguments)
        except ValueError as error:
            raise ValueError(f"strategy: FSDP1 refuses this model: {error}{_remedy(setting)}") from error
        _gathered_once(called)
    wrappers = {id(module.module): module for module in called.modules() if isinstance(module, kind)}
    stacks = [_by_wrapper(stack, wrappers) for stack in built.stacks]
    unit_of = units_of(stacks)
    weights, trained = shards(called, built, unit_of), trained_shards(called, unit_of)
    if parallel.offload:
        weights, trained = offloaded(weights, trained)
    return Rank(
        called,
        trained,
        weights,
        stacks,
        _around,
        lambda: gradients_of(called),
        by_formula=(OFFLOAD_FORMULA,) if parallel.offload else (),
        loading=loading,
    )


def _train_in_float32(model: nn.Module) -> None:
    """As ``Accelerator.prepare_model`` does before it wraps a model that runs under autocast."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _gathered_once(called: Any) -> None:
    """After the first step layers keep views of what was gathered, and PEFT reads their dtype before it is again."""
    runtime: Any = importlib.import_module("torch.distributed.fsdp._runtime_utils")
    training: Any = importlib.import_module("torch.distributed.fsdp._common_utils").HandleTrainingState
    runtime._lazy_init(called, called)
    for state in called._all_fsdp_states:
        handle = state._handle
        if handle is not None:
            handle._training_state = training.FORWARD
            runtime._unshard(state, handle, state._unshard_stream, state._pre_unshard_stream)
            runtime._reshard(state, handle, handle.uses_sharded_strategy)
            handle._training_state = training.IDLE


def _remedy(setting: StepSetting) -> str:
    """What to write where parameters of several dtypes would lie in one flat parameter."""
    packed = setting.quantization
    if packed is not None and packed.storage != setting.dtype:
        return (
            f"; packed weights are stored as {packed.storage}, and the others as {setting.dtype}: write "
            f"quantization=BitsAndBytesConfig(..., bnb_4bit_quant_storage={setting.dtype!r})"
        )
    if setting.prepare_for_kbit:
        return "; prepare_model_for_kbit_training casts norms to float32: write prepare_for_kbit=False"
    return ""


def _by_wrapper(stack: Stack, wrappers: dict[int, nn.Module]) -> Stack:
    units = tuple(tuple(wrappers.get(id(layer), layer) for layer in unit) for unit in stack.units)
    return replace(stack, units=units)


def _arguments(fsdp: Any, built: MetaModel, setting: StepSetting, parallel: Parallel) -> dict[str, Any]:
    """As accelerate passes them to ``FullyShardedDataParallel`` (``Accelerator.prepare_model``)."""
    gathered = "FULL_SHARD" if parallel.reshard_after_forward else "SHARD_GRAD_OP"
    gathered = str(parallel.option("sharding_strategy", gathered))
    prefetch = str(parallel.option("backward_prefetch", "BACKWARD_PRE")).upper()
    precision = None
    if setting.autocast:
        dtype = getattr(torch, setting.autocast)
        precision = fsdp.MixedPrecision(param_dtype=dtype, reduce_dtype=dtype, buffer_dtype=dtype)
    return {
        "sharding_strategy": getattr(fsdp.ShardingStrategy, gathered),
        "auto_wrap_policy": _policy(built.model, parallel),
        "mixed_precision": precision,
        "backward_prefetch": getattr(fsdp.BackwardPrefetch, prefetch, None),
        "forward_prefetch": bool(parallel.option("forward_prefetch", False)),
        "use_orig_params": bool(parallel.option("use_orig_params", False)),
        "sync_module_states": bool(parallel.option("sync_module_states", True)),
        "limit_all_gathers": bool(parallel.option("limit_all_gathers", True)),
    }


def _policy(model: nn.Module, parallel: Parallel) -> Any:
    """PEFT's, which Trainer sets: layers, and in them each trained part for itself; or layers of given classes."""
    if not parallel.wrap:
        peft: Any = importlib.import_module("peft.utils.other")
        return peft.fsdp_auto_wrap_policy(model)
    wrap: Any = importlib.import_module("torch.distributed.fsdp.wrap")
    classes = {type(m) for m in model.modules() if type(m).__name__ in parallel.wrap}
    parts = partial(wrap.lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    layers = partial(wrap.transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return partial(wrap._or_policy, policies=[parts, layers])


def _is_trained_leaf(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad


@contextmanager
def _around(tracker: StorageTracker) -> Iterator[None]:
    runtime: Any = importlib.import_module("torch.distributed.fsdp._runtime_utils")
    reduce = runtime._reduce_grad

    def reduced(*given: Any, **named: Any) -> Any:
        with tracker.holding("reduce buffers"):
            return reduce(*given, **named)

    replaced = [
        (runtime, "_reduce_grad", reduced),
        outside(tracker, runtime, "_post_backward_final_callback"),
    ]
    with meta_as_device(), resizes_followed(tracker), swapped(replaced):
        yield


@contextmanager
def cutting_followed(model: nn.Module, unit_of: dict[int, int], *, offloaded: bool) -> Iterator[Loading]:
    """Record what ``FullyShardedDataParallel`` makes of a model that lies in the host's memory.

    Unit after unit comes onto the device as a whole, is sent to the other ranks, flattened, and cut
    (``_init_param_handle_from_module``).

    Args:
        model: The model.
        unit_of: The unit of each parameter, by identity.
        offloaded: Whether each part goes back to the host's memory.
    """
    tracker = StorageTracker(None, StandIns(padded=False, experts=None))
    _ignore_host(tracker, model)
    fsdp: Any = importlib.import_module(_HOME)
    first: Any = importlib.import_module("torch.distributed.fsdp._init_utils")
    cut = fsdp._init_param_handle_from_module

    def cut_in_its_unit(state: Any, module: nn.Module, *given: Any) -> Any:
        own = first._get_orig_params(module, state._ignored_params)
        tracker.unit = next((unit_of.get(id(parameter), OUTSIDE) for parameter in own), OUTSIDE)
        del own  # it holds a parameter, whose storage is to go within the unit
        done = cut(state, module, *given)
        if offloaded and state._handle is not None:
            tracker.moved_away(state._handle.flat_param)
        return done

    def moved(module: nn.Module, ignored: set[nn.Parameter], *_: Any) -> None:
        for parameter in _own_parameters(module, fsdp.FullyShardedDataParallel):
            if parameter not in ignored:
                parameter.data = torch.empty_like(parameter.data)

    replaced = [(fsdp, cut.__name__, cut_in_its_unit), (first, "_move_module_to_device", moved)]
    found = Loading(tracker.events, tracker.units, tracker.sizes)
    try:
        with swapped(replaced), resizes_followed(tracker), collector.paused(), tracker.recorded():
            yield found
    finally:
        tracker.recording = False


def _ignore_host(tracker: StorageTracker, model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.ignore(tensor)


def _own_parameters(module: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Parameter]:
    """Those outside of parts that were cut already, breadth first as ``_move_module_to_device`` finds them."""
    waiting = deque([module])
    while waiting:
        current = waiting.popleft()
        yield from current.parameters(recurse=False)
        waiting.extend(child for child in current.children() if not isinstance(child, kind))
