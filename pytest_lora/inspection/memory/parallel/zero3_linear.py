"""The linear layer that DeepSpeed puts in place of torch's, once ``zero.Init`` has been entered."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional

from pytest_lora.inspection.memory.swapped import swapped


def zero3_linears() -> AbstractContextManager[None]:
    """Let every linear layer save its input, of a frozen weight too, which torch's own saves for a trained one alone.

    The same operations in the same order as ``LinearFunctionForZeroStage3`` (deepspeed/runtime/zero/linear.py, the same
    from 0.9 to 0.18). ``zero.Init`` puts it in where ``memory_efficient_linear`` is on, which is the default, and
    transformers and accelerate load a model within it; it stays to the end of the process.
    """
    return swapped([(functional, "linear", _Linear.apply)])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        ctx.save_for_backward(given, weight, bias)
        if given.dim() == 2 and bias is not None:
            return torch.addmm(bias, given, weight.t())
        output = given.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        given, weight, bias = ctx.saved_tensors
        (gradient,) = gradients
        of_input = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_weight = rows.t().matmul(given.reshape(-1, given.shape[-1])) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return of_input, of_weight, of_bias
