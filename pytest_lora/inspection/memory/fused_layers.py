"""Fused kernels in the place of a layer's own code: what they keep for the backward, from their published code.

The kernels need a GPU. Functions of the same shapes stand for them, and multiply what they multiply.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

FORMULAS = {
    "liger": (
        "Liger's RMSNorm: input and 1 number a token kept, gradient in place (liger_kernel/ops/rms_norm.py)",
        "Liger's SwiGLU: gate and up kept, gradients in place (liger_kernel/ops/swiglu.py)",
    ),
    "axolotl": (
        "Axolotl's LoRA kernels: of an MLP its input, gate and up kept, of attention's projections their inputs, "
        "factors in the dtype of the input (axolotl/kernels/lora.py)",
    ),
}
"""What is computed and not run, by whose kernels they are."""

_GATED = ("gate_proj", "up_proj", "down_proj")
_READING = ("q_proj", "k_proj", "v_proj")
_WRITING = "o_proj"


def fuse_layers(model: nn.Module, whose: str) -> None:
    """Let the layers of a model hold what fused kernels hold; those that no kernel is for stay as they are.

    Args:
        model: A model with its adapter.
        whose: ``"liger"`` or ``"axolotl"``.
    """
    for module in list(model.modules()):
        if whose == "liger":
            if type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight"):
                _put(module, _norm)
            elif all(hasattr(module, name) for name in _GATED) and hasattr(module, "act_fn"):
                _put(module, _gated_of_liger)
            continue
        adapted = {name: _is_adapted(getattr(module, name, None)) for name in (*_GATED, *_READING, _WRITING)}
        if all(adapted[name] for name in _GATED) and hasattr(module, "act_fn"):
            _put(module, _gated_of_axolotl)
        if all(adapted[name] for name in _READING):
            _share_input([getattr(module, name) for name in _READING])
        if adapted[_WRITING]:
            _share_input([getattr(module, _WRITING)])


def _put(module: Any, forward: Any) -> None:
    module.forward = MethodType(forward, module)


def _is_adapted(layer: Any) -> bool:
    """Whether a kernel is for it: one plain LoRA over a linear layer, and neither DoRA nor 8 bits."""
    factors = getattr(layer, "lora_A", None)
    if factors is None or len(factors) != 1 or getattr(layer, "lora_magnitude_vector", None):
        return False
    return hasattr(layer.get_base_layer().weight, "quant_state") or (
        layer.get_base_layer().weight.is_floating_point()
    )


def _norm(self: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
    kernel: Any = _Norm
    out: torch.Tensor = kernel.apply(hidden)
    return out


def _gated_of_liger(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    kernel: Any = _Gate
    out: torch.Tensor = self.down_proj(kernel.apply(self.gate_proj(hidden), self.up_proj(hidden)))
    return out


def _gated_of_axolotl(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    kernel: Any = _Down
    gate, up = _projected([self.gate_proj, self.up_proj], hidden)
    out: torch.Tensor = kernel.apply(gate, up, self.down_proj, *_factors(self.down_proj))
    return out


def _share_input(layers: list[Any]) -> None:
    """Layers that are called one after the other on the same input become one function of it."""
    made: list[torch.Tensor] = []

    def forward(self: Any, hidden: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if not made:
            made.extend(_projected(layers, hidden))
        return made.pop(0)

    for layer in layers:
        _put(layer, forward)


def _projected(layers: list[Any], hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    kernel: Any = _Projections
    dropout = layers[0].lora_dropout[layers[0].active_adapters[0]]
    dropped = hidden if isinstance(dropout, nn.Identity) or not layers[0].training else dropout(hidden)
    factors = [factor for layer in layers for factor in _factors(layer)]
    out: tuple[torch.Tensor, ...] = kernel.apply(hidden, dropped, layers, *factors)
    return out


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _whole(layer: Any, like: torch.Tensor) -> torch.Tensor:
    """The base's weight as the kernel multiplies with it: unpacked, where it is packed."""
    base = layer.get_base_layer()
    if base.weight.is_floating_point():
        weight: torch.Tensor = base.weight
        return weight.to(like.dtype)
    return like.new_empty(base.out_features, base.in_features)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _product(
    layer: Any, hidden: torch.Tensor, dropped: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Base and adapter of one layer, the second added in place."""
    rows = _rows(hidden)
    whole = _whole(layer, rows)
    out = torch.mm(rows, whole.t())
    del whole
    inner = torch.mm(_rows(dropped), first.t())
    torch.addmm(out, inner, second.t(), out=out)
    return out.view(*hidden.shape[:-1], out.shape[-1])


def _factor_gradients(
    gradient: torch.Tensor, read: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient at the rank, and those of both factors."""
    inner = torch.mm(gradient, second)
    of_first = torch.mm(inner.t(), read)
    of_second = torch.mm(gradient.t(), torch.mm(read, first.t()))
    return inner, of_first, of_second


class _Projections(torch.autograd.Function):
    """``LoRA_QKV``, ``LoRA_O`` and the first half of ``LoRA_MLP``: keeps its input, that of the adapters if dropout
    makes another, and the factors in its dtype."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, dropped: torch.Tensor, layers: list[Any], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.layers, ctx.drops = layers, dropped is not hidden
        pairs = [factor.to(hidden.dtype) for factor in factors]
        ctx.save_for_backward(hidden, dropped, *pairs)
        return tuple(
            _product(layer, hidden, dropped, *pairs[2 * i : 2 * i + 2]) for i, layer in enumerate(layers)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, dropped, *pairs = ctx.saved_tensors
        read, made = _rows(dropped), []
        whole_gradient = dropped_gradient = None
        for i, (layer, grad) in enumerate(zip(ctx.layers, grads, strict=True)):
            first, second = pairs[2 * i : 2 * i + 2]
            gradient = _rows(grad)
            inner, *of_factors = _factor_gradients(gradient, read, first, second)
            made += of_factors
            whole = _whole(layer, gradient)
            if whole_gradient is None:
                whole_gradient = torch.mm(gradient, whole)
                dropped_gradient = torch.zeros_like(whole_gradient) if ctx.drops else None
            else:
                torch.addmm(whole_gradient, gradient, whole, out=whole_gradient)
            del whole
            added = whole_gradient if dropped_gradient is None else dropped_gradient
            torch.addmm(added, inner, first, out=added)
        of_hidden = None if whole_gradient is None else whole_gradient.view(hidden.shape)
        of_dropped = None if dropped_gradient is None else dropped_gradient.view(hidden.shape)
        return of_hidden, of_dropped, None, *made


class _Down(torch.autograd.Function):
    """The second half of ``LoRA_MLP``: keeps gate and up, makes their product again, and gradients in their places."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, layer: Any, *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.layer = layer
        first, second = (factor.to(gate.dtype) for factor in factors)
        ctx.save_for_backward(gate, up, first, second)
        product = torch.empty_like(gate)
        return _product(layer, product, product, first, second)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up, first, second = ctx.saved_tensors
        gradient = _rows(grads[0])
        whole = _whole(ctx.layer, gradient)
        product = torch.mm(gradient, whole)
        del whole
        torch.addmm(product, torch.mm(gradient, second), first, out=product)
        _, of_first, of_second = _factor_gradients(gradient, product, first, second)
        return gate, up, None, of_first, of_second


class _Norm(torch.autograd.Function):
    """``LigerRMSNormFunction`` over a frozen weight: its input and a float32 a token; the gradient in place."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _Gate(torch.autograd.Function):
    """``LigerSiLUMulFunction``: gate and up, whose gradients take their places."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.saved_tensors
