"""What to write where a step fails here as it would on a GPU: the module that it failed in, and how to spare it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from pytest_lora.inspection.bitsandbytes_internals import quantized_layers
from pytest_lora.inspection.peft_internals import LoraLayer, fused_parameter
from pytest_lora.inspection.transformers_internals import kept_whole


def remedy(error: Exception, model: nn.Module) -> str:
    """``"; ..."`` with what to write; empty where the cause is not known."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    path = _modules_at(error, model)
    if isinstance(error, AttributeError) and path and isinstance(path[-1][1], LoraLayer):
        name = path[-1][0].rpartition(".")[2]
        return (
            f"; {path[-1][0]} returns several tensors, and PEFT can adapt layers that return one: write "
            f"exclude_modules=[{name!r}] in the LoraConfig"
        )
    adapted = [
        f"{n}.{fused[0]}" for n, m in path if isinstance(m, LoraLayer) and (fused := fused_parameter(m))
    ]
    if adapted and any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return (
            f"; PEFT adapts {adapted[-1]} as a parameter, and FSDP1 has flattened it, which fails on GPUs too: write "
            "strategy=\"fsdp2\" (fsdp_version: 2), or target modules alone, as target_modules=['q_proj', 'v_proj']"
        )
    packed = {id(layer) for layer in quantized_layers(model)}
    for name, module in reversed(path):
        own = sorted({n for n, layer in _own_layers(module) if id(layer) in packed})
        if own and "scalar type" in str(error):
            # What is written takes the place of what transformers leaves whole by itself: the head.
            modules = dict(model.named_modules())
            heads = [n for n in kept_whole(model, None) if hasattr(modules.get(n), "in_features")]
            skipped = sorted({*own, *heads})
            return (
                f"; {name} multiplies by a packed weight itself, which fails on a GPU too: leave its layers whole with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules={skipped})"
            )
    return ""


def _modules_at(error: BaseException, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a model whose code was running, from the outside to the inside, by clean base names."""
    names = {id(module): _clean(name) for name, module in model.named_modules()}
    found: dict[int, tuple[str, nn.Module]] = {}
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    for raised in (error, root):
        trace = raised.__traceback__
        while trace is not None:
            running = trace.tb_frame.f_locals.get("self")
            if isinstance(running, nn.Module) and id(running) in names:
                found.setdefault(id(running), (names[id(running)], running))
            trace = trace.tb_next
    return list(found.values())


def _own_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module and what adapters wrap, by the children's names."""
    for name, child in module.named_children():
        yield name, child
        inner = getattr(child, "base_layer", None)
        if isinstance(inner, nn.Module):
            yield name, inner


def _clean(name: str) -> str:
    return re.sub(r"(^|\.)(base_layer|_fsdp_wrapped_module)(?=\.|$)", "", name)


def excluded_by_peft(error: Exception) -> str:
    """What to write where PEFT refuses modules of a kind of model by name (``out_proj`` of Mamba's family)."""
    match = re.search(r"Module '([^']+)' is incompatible", str(error))
    return f" Write exclude_modules=[{match[1]!r}] in the LoraConfig." if match else ""
