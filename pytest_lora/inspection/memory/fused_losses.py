"""Losses that never hold all logits: what their kernels on CUDA hold, from their published code.

The kernels need a GPU. Functions of the same shapes stand for them: each makes and keeps the tensors that the
kernel's own code makes and keeps, of a head whose weight is frozen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.memory.meta_answers import swapped
from pytest_lora.inspection.memory.operations import product_flops
from pytest_lora.inspection.survey import embeddings_of

FORMULAS = {
    "chunked": "torch's linear_cross_entropy: N x H kept for the backward, logits of a chunk in float32 "
    "(torch/nn/modules/linear_cross_entropy.py)",
    "liger": "Liger's fused linear cross entropy: N x H kept for the backward, logits of a chunk "
    "(liger_kernel/ops/fused_linear_cross_entropy.py)",
    "cut": "cut cross entropy: N log-sum-exps and V means kept for the backward, no logits "
    "(cut_cross_entropy/cce.py)",
}
"""What is computed and not run, by the name of a loss; N tokens, H wide, V words."""


def fuse_loss(transformer: Any, setting: StepSetting) -> None:
    """Let a base compute its loss from the last hidden states, without logits.

    Raises:
        ValueError: It has no head that such a loss could read, or the installed torch has no such loss.
    """
    head = embeddings_of(transformer, "output")
    if not type(transformer).__name__.endswith("ForCausalLM") or not isinstance(head, nn.Linear):
        raise ValueError(
            f"loss: {setting.loss!r} is computed from the plain head of a causal language model, which "
            f"{type(transformer).__name__} has not; leave loss out"
        )
    if hasattr(head, "lora_A") or head.weight.dtype == torch.uint8 or head.weight.requires_grad:
        raise ValueError(
            f"loss: {setting.loss!r} reads the head's weight itself: leave {'lm_head'!r} out of target_modules, "
            "modules_to_save and quantization"
        )
    if setting.loss == "chunked":
        _torch_options()
    outputs: Any = importlib.import_module("transformers.modeling_outputs").CausalLMOutputWithPast

    def forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.base_model(*args, **kwargs)[0]
        kernel: Any = _KERNELS[setting.loss]
        weight = self.get_output_embeddings().weight
        return outputs(loss=kernel.apply(hidden.reshape(-1, hidden.shape[-1]), weight))

    transformer.forward = MethodType(forward, transformer)


def _torch_options() -> Any:
    """How the installed torch chunks.

    Raises:
        ValueError: It is older than that.
    """
    try:
        return importlib.import_module("torch.nn.modules.linear_cross_entropy_options")
    except ImportError as error:
        raise ValueError(
            f"loss: 'chunked' is the loss of torch, of which version {torch.__version__} has none; "
            "pip install 'torch>=2.13'"
        ) from error


def _torch_chunk(rows: int, width: int, words: int, dtype: torch.dtype) -> int:
    options = _torch_options()
    method = options._AUTO_DEFAULTS.get(("cuda", dtype), options._AUTO_FALLBACK).chunking_method
    found: int = options.LinearCrossEntropyOptions()._compute_batch_chunk_size(rows, width, words, method)
    return max(1, found)


def liger_chunk(rows: int, width: int, words: int) -> int:
    """Tokens whose logits Liger holds at once: about as many bytes as all hidden states."""
    least = -(-rows // -(-words // width))
    return 1 << (least - 1).bit_length()


def _lowered(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In autocast's dtype, where it is on."""
    if not torch.is_autocast_enabled("meta"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("meta")
    return [tensor.to(dtype) for tensor in tensors]


class _Chunked(torch.autograd.Function):
    """One buffer of logits in float32 for all chunks; the hidden states' gradient is made with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden, weight = _lowered(hidden, weight)
        rows, (words, width) = hidden.shape[0], weight.shape
        size = _torch_chunk(rows, width, words, hidden.dtype)
        logits = hidden.new_empty(size, words, dtype=torch.float32)
        ctx.gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, rows, size):
            part = hidden[start : start + size]
            filled = logits.view(hidden.dtype)[: len(part), :words]
            torch.mm(part, weight.t(), out=filled)
            if ctx.gradient is not None:
                of_targets = torch.empty_like(part)
                torch.mm(filled, weight, out=ctx.gradient[start : start + size])
                del of_targets
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.gradient, None


class _Liger(torch.autograd.Function):
    """Logits of a chunk become their gradient in place, and with the head's weight that of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gradient = torch.zeros_like(hidden)
        losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        size = liger_chunk(hidden.shape[0], hidden.shape[1], weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            part, inner = _lowered(hidden[start : start + size], weight)
            logits = torch.mm(part, inner.t())
            if ctx.needs_input_grad[0]:
                gradient[start : start + size] = torch.mm(logits, inner)
            del logits, part, inner
        ctx.gradient = gradient if ctx.needs_input_grad[0] else None
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.gradient, None


class _Cut(torch.autograd.Function):
    """Tiles of the logits stay on the chip; the backward computes them again."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden, weight = _lowered(hidden, weight)
        rows, words = hidden.shape[0], weight.shape[0]
        valid = hidden.new_empty(rows, dtype=torch.int32)
        log_sum_exp = hidden.new_empty(rows, dtype=torch.float32)
        means = weight.new_empty(words, dtype=torch.float32)
        losses = torch.empty_like(log_sum_exp)
        _on_chip(hidden, weight)
        ctx.save_for_backward(hidden, weight, valid, log_sum_exp, means)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, _, _, means = ctx.saved_tensors
        order = means.argsort().to(torch.int32)
        gradient = torch.zeros_like(hidden)
        for _ in range(2):  # the logits again, and from their gradient that of the hidden states
            _on_chip(hidden, weight)
        del order
        return gradient, None


def _on_chip(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The operations of a product whose result is nowhere in memory."""
    rows, words = hidden.shape[0], weight.shape[0]
    torch.mm(hidden, weight.t(), out=hidden.new_empty(1).expand(rows, words))


_KERNELS = {"chunked": _Chunked, "liger": _Liger, "cut": _Cut}


@contextmanager
def fused_kernels(count: Callable[[int], None]) -> Iterator[None]:
    """Let TRL's fused head leave the storages that its CUDA kernels leave: they fold each tile in place.

    ``count`` is told the operations of the products among them. Tokens that are not scored are left out before the
    head; without values all are scored.
    """
    try:
        kernels: Any = importlib.import_module("trl.kernels.chunked_logprob")
    except ImportError:  # older than the fused head
        yield
        return
    utilities: Any = importlib.import_module("trl.trainer.utils")

    def fold(*_: Any, **__: Any) -> None:
        """In place."""

    def add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        count(product_flops(left, right))

    replaced = [
        (kernels, "_forward_tile", fold),
        (kernels, "_backward_tile", fold),
        (kernels, "_addmm_fp32", add_product),
        (utilities, "_use_triton", lambda device: True),
    ]
    with swapped(replaced):
        yield
