"""What CUDA's kernels hold in memory, where the CPU build of torch would take another path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from pytest_lora.facts.memory_choices import Attention
from pytest_lora.inspection.memory.meta_answers import swapped
from pytest_lora.inspection.memory.operations import attention_backward_flops, attention_flops

_torch_attention = functional.scaled_dot_product_attention
_torch_dropout = functional.dropout
_torch_autocast = torch.autocast
_torch_is_enabled = torch.is_autocast_enabled
_torch_dtype_of = torch.get_autocast_dtype

LOWERED: tuple[tuple[Any, str], ...] = (
    (functional, "linear"),
    (functional, "conv1d"),
    (functional, "conv2d"),
    (torch, "matmul"),
    (torch, "bmm"),
    (torch, "addmm"),
    (torch, "baddbmm"),
    (torch, "einsum"),  # it calls bmm where this list does not reach
    *((torch.Tensor, name) for name in ("matmul", "__matmul__", "bmm", "addmm", "baddbmm")),
)
RAISED: tuple[tuple[Any, str], ...] = (
    (functional, "layer_norm"),
    (functional, "softmax"),
    (functional, "log_softmax"),
    (functional, "cross_entropy"),
)
"""What autocast runs in the lower precision, and what in float32:
https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior"""
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def cuda_kernels(
    autocast: torch.dtype | None,
    attention: Attention = "flash",
    count: Callable[[int], None] = lambda _: None,
) -> Iterator[None]:
    """Let attention and dropout on the meta device leave the storages that their CUDA kernels leave.

    - Scaled dot product attention takes the kernel that is named, or with a mask the memory-efficient one. Flash,
      cuDNN's and the memory-efficient one hold their inputs, their output and the log-sum-exp for the backward. What
      they cannot run takes the math path, as on CUDA
      (``torch.nn.attention.SDPBackend``, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). ``count`` is told
      their operations.
    - Dropout keeps a mask of one byte a number (``aten::native_dropout``).
    - Autocast, which torch does not know for the meta device, casts the arguments of ``LOWERED`` to the given
      dtype and those of ``RAISED`` to float32 (the lists of torch.amp that models run into).

    The functions are replaced where modules look them up: a ``TorchFunctionMode`` would be off in the
    backward, where checkpointing runs the forward again.
    """
    attend = partial(_attention, attention, count)
    replaced: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", attend),
        (functional, "dropout", _dropout),
    ]
    casts = _Autocast(autocast)
    replaced.append((torch, "is_autocast_enabled", casts.is_enabled))
    replaced.append((torch, "get_autocast_dtype", casts.dtype_of))
    if autocast is not None:
        replaced[0] = (functional, "scaled_dot_product_attention", casts.casting(attend, autocast))
        replaced += [(m, n, casts.casting(getattr(m, n), autocast)) for m, n in LOWERED]
        replaced += [(m, n, casts.casting(getattr(m, n), torch.float32)) for m, n in RAISED]
        replaced.append((torch, "autocast", casts.autocast))
    else:
        replaced.append((torch, "autocast", _no_autocast))
    with swapped(replaced):
        yield


def _dropout(tensor: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0.0 or not tensor.is_meta:
        return _torch_dropout(tensor, p, training, inplace)
    return torch.ops.aten.native_dropout(tensor, p, True)[0]


class _Autocast:
    """Whether arguments are cast now: code may turn that off for a while, and ask."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._enabled = dtype is not None

    def is_enabled(self, device_type: str = "cuda") -> bool:
        """In the place of ``torch.is_autocast_enabled``."""
        return self._enabled if device_type == "meta" else _torch_is_enabled(device_type)

    def dtype_of(self, device_type: str) -> torch.dtype:
        """In the place of ``torch.get_autocast_dtype``."""
        if device_type == "meta" and self._dtype is not None:
            return self._dtype
        return _torch_dtype_of("cuda" if device_type == "meta" else device_type)

    def casting(self, function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
        """The function with its floating-point arguments in a dtype."""

        def cast(value: Any) -> Any:
            castable = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != dtype
            return value.to(dtype) if castable and value.is_meta else value

        def called(*args: Any, **kwargs: Any) -> Any:
            if not self._enabled:
                return function(*args, **kwargs)
            return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

        return called

    def autocast(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        """In the place of ``torch.autocast``."""
        if device_type != "meta":
            return _torch_autocast(device_type, dtype, enabled, **kwargs)
        return self._set(enabled)

    @contextmanager
    def _set(self, enabled: bool) -> Iterator[None]:
        before, self._enabled = self._enabled, enabled
        try:
            yield
        finally:
            self._enabled = before


def _no_autocast(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
    return nullcontext() if device_type == "meta" else _torch_autocast(device_type, *args, **kwargs)


def _attention(
    kernel: Attention,
    count: Callable[[int], None],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    fast = kernel in ("flash", "cudnn") and attn_mask is None
    fast = fast and query.dtype in _HALF and query.shape[-1] <= 256
    follows = fast and query.shape[-1] == value.shape[-1]
    efficient = query.shape[1] == key.shape[1] and not (attn_mask is not None and attn_mask.requires_grad)
    fused = kernel != "math" and (fast or efficient)
    if query.dim() == 4 and query.is_meta and fused:
        bias = None if attn_mask is None else attn_mask.to(query.dtype)
        attention: Any = _FusedAttention
        out: torch.Tensor = attention.apply(query, key, value, bias, kernel != "cudnn", follows, count)
        return out
    return _torch_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _FusedAttention(torch.autograd.Function):
    """Storages of the fused kernels, forward and backward.

    Flash and cuDNN's lay out the output as the query lies in memory (``out = at::empty_like(q_padded)``,
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp; ``alloc_with_matching_layout``, cudnn/MHA.cpp),
    and the gradients as their inputs. A model that puts heads side by side again copies what has heads first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        widens: bool,
        follows: bool,
        count: Callable[[int], None],
    ) -> torch.Tensor:
        ctx.widens, ctx.follows, ctx.count = widens, follows, count
        count(attention_flops(query, key, value))
        batch, heads, length, _ = query.shape
        if follows:
            out = torch.empty_like(query)
        else:
            out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, _, log_sum_exp, _ = ctx.saved_tensors
        ctx.count(attention_backward_flops(query, key, value))
        delta = torch.empty_like(log_sum_exp)
        query_accumulated = query.new_empty(query.shape, dtype=torch.float32)
        wide = []
        if (
            ctx.widens and key.shape[1] != query.shape[1]
        ):  # a gradient a query head, summed over each group then
            wide = [query.new_empty(query.shape[0], query.shape[1], *t.shape[2:]) for t in (key, value)]
        make = torch.empty_like if ctx.follows else _like
        gradients = tuple(make(t) for t in (query, key, value))
        del delta, query_accumulated, wide
        return *gradients, None, None, None, None


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A gradient in the memory-efficient kernel's own layout: (batch, length, heads, width) in memory."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width).transpose(1, 2)
