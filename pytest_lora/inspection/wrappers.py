"""Wrappers that shard, reduce or compile a model, and adapters that came after them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pytest_lora.facts.model import LateAdapter
from pytest_lora.inspection.peft_internals import BaseTuner


def late_adapters(model: nn.Module) -> Iterator[LateAdapter]:
    """Adapters that were put in after something wrapped the model, so that the wrapper does not know them.

    DDP keeps a list of the parameters that it was made with, the first FSDP puts them into flat ones, the second makes
    them distributed tensors. Around a compiled model, PEFT saves keys with the name of the compiled one in them.
    """
    yield from _on_a_compiled_model(model)
    if not (dist.is_available() and dist.is_initialized()):
        return  # DDP and FSDP ask for a process group
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            yield from _missed("DistributedDataParallel", module, _known_to_ddp(module))
        elif (sharded := _known_to_fsdp(module)) is not None:
            yield from _missed("FSDP", module, sharded)
            return  # those inside are the same


def _on_a_compiled_model(model: nn.Module) -> Iterator[LateAdapter]:
    above: nn.Module | None = model
    while above is not None and not isinstance(above, BaseTuner):
        above = next(above.children(), None)  # whatever wraps a model holds it first
    if isinstance(above, BaseTuner) and hasattr(above.model, "_orig_mod"):
        yield LateAdapter("torch.compile", tuple(n for n, _ in above.named_parameters() if "lora_" in n))


def _missed(wrapper: str, module: nn.Module, known: set[int]) -> Iterator[LateAdapter]:
    own = [(name, p) for name, p in module.named_parameters() if "lora_" in name]
    missed = tuple(name for name, p in own if id(p) not in known)
    if missed:
        yield LateAdapter(wrapper, missed)


def _known_to_ddp(module: Any) -> set[int]:
    ignored = {id(p) for name, p in module.module.named_parameters() if name in module.parameters_to_ignore}
    return ignored | {id(p) for p in module._module_parameters}


def _known_to_fsdp(module: Any) -> set[int] | None:
    """Parameters that FSDP shards; None where the module is not one of its kinds."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    if isinstance(module, fsdp.FullyShardedDataParallel):
        flat = [
            p
            for m in module.modules()
            for p in m.parameters(recurse=False)
            if isinstance(p, fsdp.FlatParameter)
        ]
        handles = (getattr(m, "_handle", None) for m in module.modules())
        flat += [handle.flat_param for handle in handles if handle is not None]
        return {id(p) for f in flat for p in (f, *(getattr(f, "_params", None) or ()))}
    if isinstance(module, fsdp.FSDPModule):
        return {id(p) for p in module.parameters() if hasattr(p, "placements")}
    return None
