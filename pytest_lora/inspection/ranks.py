"""The adapter on every rank of a process group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from pytest_lora.facts.behaviour import SyncFacts, WeightDifference
from pytest_lora.inspection.placement import gathered
from pytest_lora.inspection.wrappers import late_adapters
from pytest_lora.values import shown


def sync_facts(model: Any) -> SyncFacts:
    """Compare the adapter's weights, and all that is trained, between the ranks; to be called on all of them.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``model`` is no module, or has no adapter.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {shown(model)}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "check_adapters_in_sync needs a process group: call it in run_distributed or torchrun"
        )
    with ExitStack() as stack, torch.no_grad():
        _gather_shards(model, stack)
        own = {name: gathered(tensor).detach() for name, tensor in _adapter_weights(model)}
        if not own:
            raise TypeError(
                f"model: this {type(model).__name__} has no adapter: no LoRA weights and nothing that is trained"
            )
        digests: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(digests, {name: _digest(tensor) for name, tensor in own.items()})
        return SyncFacts(
            len(digests), len(own), tuple(_differences(digests, own)), tuple(late_adapters(model))
        )


def _gather_shards(model: Any, stack: ExitStack) -> None:
    """Put together, for the time being, what the first FSDP has sharded."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=False))


def _adapter_weights(model: Any) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            yield name, parameter


def _digest(tensor: Any) -> str:
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(numbers.tobytes()).hexdigest()}"


def _differences(digests: list[dict[str, str]], own: dict[str, Any]) -> Iterator[WeightDifference]:
    """Yield each weight that is not the same everywhere; all ranks see the same ones, in one order."""
    for name in sorted({name for digest in digests for name in digest}):
        there = [digest.get(name) for digest in digests]
        if len(set(there)) == 1:
            continue
        ranks = tuple(rank for rank, value in enumerate(there) if value != there[0])
        if any(value is None for value in there):
            yield WeightDifference(name, ranks, "missing", None)
        elif len({value.rpartition(" ")[0] for value in there if value}) > 1:
            yield WeightDifference(name, ranks, "form", None)
        else:
            nothing = _digest(torch.zeros_like(own[name]))
            zero = tuple(rank for rank, value in enumerate(there) if value == nothing)
            yield WeightDifference(name, ranks, "values", _largest_difference(own[name]), zero)


def _largest_difference(own: torch.Tensor) -> float:
    """The largest difference from rank 0 on any rank."""
    first = own.clone()
    dist.broadcast(first, src=0)
    largest = (own.double() - first.double()).abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())
