"""What a model does when it is saved, merged, padded or switched off, tried on copies, as facts.

Here are the copies of a model to try things on, their outputs, and how these are compared.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytest_lora.inspection.bitsandbytes_internals import keep_packing, unpack_for_cpu
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import (
    WRAPPERS,
    BaseTunerLayer,
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    forget_adapters,
    xlora_models,
)
from pytest_lora.inspection.state.precision import in_float64
from pytest_lora.inspection.state.tensors import same_contents

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Deviation of the merged output, relative to its largest value: about 1,000 rounding steps of float32, and 4 of
the half precisions, whose weights are rounded once more by the merge."""

PIECE = 2**24
"""Numbers that are compared at a time: in float64 the logits of a batch would take as much memory as a model."""

_SWITCHES = (BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)


# ---------------------------------------------------------------------------------------- copies


def adapted_copy(model: nn.Module) -> nn.Module:
    """A copy, in evaluation mode, of the part of the model that PEFT can save; its adapters enabled and unmerged.

    Raises:
        TypeError: ``model`` carries no LoRA layers.
        ValueError: It cannot be copied, has no values, or is one of X-LoRA.
    """
    found = adapted_survey(model)
    if xlora_models(model):
        raise ValueError(
            "model: X-LoRA weighs its adapters anew for every token: they cannot be merged, and are saved apart "
            "from it; give a model with one of the adapters"
        )
    wrapped: nn.Module | None = next((m for m in model.modules() if isinstance(m, WRAPPERS)), None)
    copied = copy_of("model", found.root if wrapped is None else wrapped)
    for module in copied.modules():
        # Enabling what is enabled would make frozen adapters trainable.
        if isinstance(module, _SWITCHES) and module.disable_adapters:
            module.enable_adapters(True)
    for layer in lora_layers(copied).values():
        if layer.merged:
            layer.unmerge()
    return copied


def copy_of(argument: str, model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode.

    Raises:
        ValueError: It cannot be copied, or has no values; the message names the argument.
    """
    try:
        made = copy.deepcopy(model, {id(kept): kept.detach() for kept in _with_graph(model)})
    except Exception as error:  # whatever the attributes of a model raise
        raise ValueError(f"{argument} cannot be copied, which this check needs: {error}") from error
    return quiet_eval(argument, made)


def _with_graph(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules remember from a forward, of which ``deepcopy`` makes no copy: auxiliary losses, samples,
    and the views of an embedding's factors that PEFT leaves in a head tied to it."""
    left: list[Any] = [list(vars(module).values()) for module in model.modules()]
    while left:
        kept = left.pop()
        if isinstance(kept, Tensor) and kept.grad_fn is not None:
            yield kept
        elif type(kept) in (list, tuple, dict):
            left.extend(kept.values() if type(kept) is dict else kept)


def collect(model: nn.Module) -> None:
    """Free copies of a model on a GPU that nothing refers to any more: models of PEFT are cycles."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        gc.collect()


def quiet_eval(argument: str, model: nn.Module) -> nn.Module:
    """Put a copy into evaluation mode in a way that leaves its original alone.

    Raises:
        ValueError: It has no values; the message names the argument.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{argument} is on the meta device and has no values; load its weights first")
    unpack_for_cpu(model)
    keep_packing(model)
    for module in model.modules():
        for parameter in module._parameters.values():
            # A copied Params4bit still points to the original's module, and quantizing it anew writes there.
            if isinstance(getattr(parameter, "module", None), nn.Module):
                vars(parameter)["module"] = module
    return model.eval()


def base_without_adapter(adapted: nn.Module, *, forget_trained: bool = False) -> nn.Module:
    """A copy of the base with every adapter and every trained copy taken off, not with PEFT's ``unload``.

    That leaves a trained head in place. With ``forget_trained``, base weights that were trained are zeroed, so
    that they come back only if the checkpoint holds them.
    """
    base = copy.deepcopy(adapted_survey(adapted).root)
    for layer in lora_layers(base).values():
        if layer.merged:  # layers over GPTQ's and others' cannot be unmerged
            layer.unmerge()
    _unwrap(base)
    forget_adapters(base)
    for parameter in base.parameters():
        if forget_trained and parameter.requires_grad and parameter.is_floating_point():
            parameter.data.zero_()
    return quiet_eval("model", base)


def _unwrap(parent: nn.Module) -> None:
    """Replace wrappers by what they wrap, which may hold wrappers too: attention's ``out_proj`` is one."""
    for name, child in list(parent.named_children()):
        inner = _inner(child)
        if inner is not None:
            setattr(parent, name, inner)
        _unwrap(child if inner is None else inner)


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper of PEFT wraps, down to the bottom; None for any other module."""
    inner: Any = module
    while True:
        if isinstance(inner, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            inner = inner.original_module
        elif isinstance(inner, BaseTunerLayer):
            inner = inner.get_base_layer()
        else:
            return None if inner is module else as_module(inner)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def as_module(model: Any) -> nn.Module:
    """The model, as what it is to a type checker."""
    assert isinstance(model, nn.Module)
    return model


# ---------------------------------------------------------------------------------------- outputs


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """The logits, or the first tensor, that a model gives for a batch."""
    with torch.no_grad():
        if isinstance(batch, Mapping):
            result: Any = model(**batch)
        elif isinstance(batch, (tuple, list)):
            result = model(*batch)
        else:
            result = model(batch)
    return main_tensor(result)


def main_tensor(result: Any) -> Tensor:
    """The logits, or the first tensor, of what a model gave.

    Raises:
        ValueError: There is none.
    """
    if isinstance(result, Tensor):
        return result
    values: dict[Any, Any] = dict(result) if isinstance(result, Mapping) else dict(enumerate(result))
    preferred = [values.get("logits"), values.get("last_hidden_state"), *values.values()]
    for value in preferred:
        if isinstance(value, Tensor) and value.dim():
            return value
    raise ValueError("model gives no tensor that could be compared")


def stable_output(model: nn.Module, batch: Any) -> Tensor:
    """The output for a batch, which a second run repeats.

    Raises:
        ValueError: The model does not take the batch, gives no number for it, or different ones in both runs.
    """
    try:
        first = output_of(model, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises for what it does not take
        raise ValueError(f"batch: the model raises {type(error).__name__} for it: {error}") from error
    if not first.isfinite().any():
        raise ValueError("batch: the model gives no finite number for it; nothing can be compared")
    if not identical(first, output_of(model, batch)):
        raise ValueError(
            "model gives different outputs for the same batch in evaluation mode; nothing can be compared. Where a "
            "sum in no fixed order on the GPU is the reason, torch.use_deterministic_algorithms(True) helps"
        )
    return first


def watched_output(model: nn.Module, batch: Any) -> tuple[Tensor, frozenset[str]]:
    """The output for a batch, and the buffers that running the model changes, such as counters."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = stable_output(model, batch)
    after = dict(model.named_buffers())
    return output, frozenset(n for n, b in after.items() if n not in before or not identical(before[n], b))


def without_adapter(layers: dict[str, Any], run: Callable[[], Tensor]) -> Tensor:
    """What ``run`` gives while these LoRA layers are disabled."""
    for layer in layers.values():
        layer.enable_adapters(False)
    result = run()
    for layer in layers.values():
        layer.enable_adapters(True)
    return result


# ---------------------------------------------------------------------------------------- comparisons


def identical(first: Tensor, second: Tensor) -> bool:
    """Equal bit for bit, where NaN is equal to NaN."""
    if is_traceable_wrapper_subclass(first):
        return same_contents(first, second)
    if torch.equal(first, second):
        return True
    return first.shape == second.shape and bool(_same(first, second).all())


def distance(first: Tensor, second: Tensor) -> float:
    """The largest difference of two numbers in the same place; infinities and NaN that are in both are none."""
    if first.shape != second.shape:
        return float("inf")
    if not first.numel():
        return 0.0
    pairs = zip(_pieces(first), _pieces(second), strict=True)
    return float(torch.stack([_farthest(in_float64(one), in_float64(other)) for one, other in pairs]).max())


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[low : low + PIECE] for low in range(0, flat.numel(), PIECE))


def _farthest(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs().masked_fill_(_same(first, second), 0.0).max()


def _same(first: Tensor, second: Tensor) -> Tensor:
    return (first == second) | (first.isnan() & second.isnan())


def largest(tensor: Tensor) -> float:
    """The largest finite absolute value, 0 where there is none."""
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        tensor = tensor.float()  # torch asks no 8-bit float whether it is finite
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
