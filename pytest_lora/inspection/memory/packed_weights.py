"""Weights that a checkpoint stores quantized by other means than bitsandbytes, and what it takes to use them.

The packages that hold their kernels need a GPU. So layers of the stored shapes stand for theirs: a matrix is unpacked
whole for each product, forward and backward, as the reference kernels do; fused kernels take less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.memory import Quantization, StepSetting
from pytest_lora.inspection.skeleton import META

STATISTICS = "_pytest_lora_statistics"
"""Attribute of a packed weight: the tensors beside it."""


def pack_weights(model: nn.Module, kept: list[str], setting: StepSetting) -> None:
    """Give a model on the meta device the packed weights of a pre-quantized checkpoint.

    Args:
        model: It is changed.
        kept: Names of modules, or parts of names, that stay whole.
        setting: How the checkpoint is stored, and the dtype that it computes in.
    """
    dtype: torch.dtype = getattr(torch, setting.dtype)
    quantization = setting.quantization or Quantization("fp8")
    stored = _STORED[quantization.method]
    for name, module in list(model.named_modules()):
        if any(f"{part}." in f"{name}." for part in kept):
            continue
        if quantization.method != "mxfp4" and type(module) is nn.Linear:
            model.set_submodule(name, _PackedLinear(module, stored, quantization, dtype))
        elif quantization.method in _FUSED:
            _pack_fused(module, stored, quantization, setting)
    marked: Any = model
    marked.quantization_method = quantization.method


Stored = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
"""A packed weight, and the tensors beside it."""


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def _gptq(shape: tuple[int, ...], how: Quantization) -> Stored:
    """``qweight``, ``qzeros``, ``scales``, ``g_idx`` (https://github.com/ModelCloud/GPTQModel, format ``gptq``)."""
    outputs, inputs = shape
    groups = -(-inputs // (how.group_size or inputs))
    packed = _empty(math.ceil(inputs * how.bits / 32), outputs, dtype=torch.int32)
    zeros = _empty(groups, math.ceil(outputs * how.bits / 32), dtype=torch.int32)
    return packed, (
        zeros,
        _empty(groups, outputs, dtype=torch.float16),
        _empty(inputs, dtype=torch.int32),
    )


def _awq(shape: tuple[int, ...], how: Quantization) -> Stored:
    """``qweight``, ``qzeros``, ``scales`` (https://github.com/casper-hansen/AutoAWQ, version ``gemm``)."""
    outputs, inputs = shape
    groups = -(-inputs // (how.group_size or inputs))
    packed = _empty(inputs, outputs * how.bits // 32, dtype=torch.int32)
    zeros = _empty(groups, outputs * how.bits // 32, dtype=torch.int32)
    return packed, (zeros, _empty(groups, outputs, dtype=torch.float16))


def _fp8(shape: tuple[int, ...], how: Quantization) -> Stored:
    """A byte a number, a float32 a block (``transformers.integrations.finegrained_fp8.FP8Linear``)."""
    rows, columns = how.block_size or shape[-2:]
    scales = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    return _empty(*shape, dtype=torch.float8_e4m3fn), (_empty(*scales, dtype=torch.float32),)


def _mxfp4(shape: tuple[int, ...], how: Quantization) -> Stored:
    """Two numbers a byte, a byte of scale for 32 of them (OCP Microscaling Formats, version 1.0, section 5.2)."""
    numbers = math.prod(shape)
    return _empty(numbers // 2, dtype=torch.uint8), (_empty(numbers // 32, dtype=torch.uint8),)


_STORED: dict[str, Callable[[tuple[int, ...], Quantization], Stored]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}
_FUSED = ("fp8", "mxfp4")
"""Methods that pack the fused experts of a mixture too."""


def _parameter(stored: Stored) -> nn.Parameter:
    weight = nn.Parameter(stored[0], requires_grad=False)
    setattr(weight, STATISTICS, stored[1])
    return weight


class _PackedLinear(nn.Linear):
    """A linear layer whose weight is unpacked for each product."""

    def __init__(self, whole: nn.Linear, stored: Any, how: Quantization, dtype: torch.dtype) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device=META)
        self.compute_dtype = dtype
        self.weight = _parameter(stored(tuple(whole.weight.shape), how))
        self.bias = whole.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        product: Any = _PackedProduct
        out: torch.Tensor = product.apply(values.to(self.compute_dtype), self.out_features)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(values.dtype)


class _PackedProduct(torch.autograd.Function):
    """A product with a matrix that is unpacked, forward and backward, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, outputs: int) -> torch.Tensor:
        ctx.inputs = values.shape[-1]
        whole = values.new_empty(outputs, values.shape[-1])
        rows = torch.ops.aten.mm(values.reshape(-1, values.shape[-1]), whole.t())
        product: torch.Tensor = rows.view(*values.shape[:-1], outputs)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        whole = grad.new_empty(grad.shape[-1], ctx.inputs)
        rows = torch.ops.aten.mm(grad.reshape(-1, grad.shape[-1]), whole)
        return rows.view(*grad.shape[:-1], ctx.inputs), None


def _pack_fused(module: nn.Module, stored: Any, how: Quantization, setting: StepSetting) -> None:
    """Pack the three-dimensional parameters of a mixture's experts; while they run, whole ones stand in their place."""
    shapes = {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None and p.dim() == 3}
    if not shapes:
        return
    for name, shape in shapes.items():
        module._parameters[name] = _parameter(stored(shape, how))
    unpacked = _Unpacked(
        shapes, getattr(torch, setting.dtype), kept_back=bool(setting.gradient_checkpointing)
    )
    module.register_forward_pre_hook(unpacked.enter)
    module.register_forward_hook(unpacked.leave, always_call=True)


class _Unpacked:
    """Whole weights in the place of packed ones while a module runs; its backward unpacks them again.

    Args:
        shapes: By name.
        dtype: Of the whole weights.
        kept_back: Whether checkpointing drops what is saved for the backward, and the whole weights with it.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, *, kept_back: bool) -> None:
        self._kept_back = kept_back
        self._shapes = shapes
        self._dtype = dtype
        self._storages: set[int] = set()
        self._contexts: list[Any] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        whole = {name: _empty(*shape, dtype=self._dtype) for name, shape in self._shapes.items()}
        vars(module).update(whole)
        if self._kept_back:
            return
        self._storages = {id(tensor.untyped_storage()) for tensor in whole.values()}
        context: Any = torch.autograd.graph.saved_tensors_hooks(self._save, self._restore)
        context.__enter__()
        self._contexts.append(context)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._contexts:
            self._contexts.pop().__exit__(None, None, None)
        for name in self._shapes:
            vars(module).pop(name, None)

    def _save(self, tensor: torch.Tensor) -> Any:
        if id(tensor.untyped_storage()) in self._storages:
            return tensor.shape, tensor.stride(), tensor.dtype
        return tensor

    def _restore(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        shape, stride, dtype = saved
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)
