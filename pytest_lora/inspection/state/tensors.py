"""Tensors: contents, form, gradients and hooks, taken, compared and put back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.inspection.state.attributes import refill

_SMALL_BYTES = 2**17
"""Up to this size, calling a comparison costs more than comparing, so that such tensors are compared together."""
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_Form = tuple[torch.dtype, torch.Size, torch.device, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorState:
    name: str
    tensor: Tensor
    owner: nn.Module
    content: Content
    form: _Form
    requires_grad: bool
    grad: Tensor | None
    packed: bool
    is_shared: bool
    hooks: dict[str, dict[int, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, tensor: Tensor, owner: nn.Module, content: Content, is_shared: bool
    ) -> TensorState:
        hooks = {key: dict(getattr(tensor, key, None) or {}) for key in _TENSOR_HOOKS}
        grad = tensor.grad if tensor.is_leaf else None
        packed = _is_packed(tensor)
        form = _form(tensor)
        return cls(name, tensor, owner, content, form, tensor.requires_grad, grad, packed, is_shared, hooks)

    def is_intact(self) -> bool:
        return _form(self.tensor) == self.form and self.content.equals(self.tensor)

    def is_repacked(self) -> bool:
        """Whether bitsandbytes packed 4-bit weights anew for inference on this CPU."""
        return _is_packed(self.tensor) and not self.packed

    def is_changed_by_library(self) -> bool:
        """Whether a healthy forward pass changes this tensor: running statistics; biases cast by bitsandbytes."""
        if isinstance(self.owner, nn.modules.batchnorm._NormBase) and not isinstance(
            self.tensor, nn.Parameter
        ):
            return True
        is_cast = self.tensor.dtype != self.form[0] and self.tensor.shape == self.form[1]
        quantized = type(self.owner).__module__.startswith("bitsandbytes.")
        return is_cast and quantized and self.name.endswith("bias")

    def restore(self, look: bool) -> bool:
        tensor = self.tensor
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        for key, before in self.hooks.items():
            if (now := getattr(tensor, key, None)) is not None and dict(now) != before:
                refill(now, before)
        if self.is_shared or not look or self.is_intact():
            return True
        if self.content.copy is None:
            return False
        if _form(tensor) == self.form:
            tensor.data.copy_(self.content.copy)
        else:
            tensor.data = self.content.copy.to(self.form[2], copy=True)
        return self.is_intact()


class Contents:
    """Contents of many tensors: the small ones in CPU memory are compared at once."""

    def __init__(self, states: list[TensorState]) -> None:
        self._small = [s for s in states if s.content.live is not None and s.tensor.nbytes <= _SMALL_BYTES]
        small = set(map(id, self._small))
        self._others = [state for state in states if id(state) not in small]
        self._tensors = [state.tensor for state in self._small]
        with torch._C.DisableTorchFunctionSubclass():
            self._places = self._now()
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for state in self._small:
            if state.content.live is not None and state.content.words is not None:
                live, words = kinds.setdefault(state.content.words.dtype, ([], []))
                live.append(state.content.live)
                words.append(state.content.words)
        self._joined = [(live, torch.cat(words)) for live, words in kinds.values()]

    def _now(self) -> list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors]

    def differing(self) -> list[TensorState]:
        """The tensors that are not what they were."""
        suspects = self._others
        if self._now() != self._places or not all(torch.equal(torch.cat(a), b) for a, b in self._joined):
            suspects = suspects + self._small
        return [state for state in suspects if not state.is_intact()]


@dataclass(frozen=True, slots=True)
class Content:
    """A tensor's bytes: a copy in CPU memory, or a fingerprint.

    ``live`` and ``words`` are the tensor's own memory, at ``address``, and the copy as integers, made once for
    fast comparisons.
    """

    copy: Tensor | None
    fingerprint: int | None
    live: Tensor | None = None
    words: Tensor | None = None
    address: int = 0

    @classmethod
    def of(cls, tensor: Tensor, copied: bool) -> Content:
        if tensor.is_meta:
            return cls(None, None)
        if copied:
            before = tensor.detach().to("cpu", copy=True)
            live = _words(tensor) if tensor.device.type == "cpu" else None
            return cls(before, None, live, _words(before), tensor.data_ptr())
        return cls(None, _fingerprint(tensor))

    def equals(self, tensor: Tensor) -> bool:
        if self.copy is None:
            return self.fingerprint is None or self.fingerprint == _fingerprint(tensor)
        if self.live is None or self.words is None or self.address != tensor.data_ptr():
            return torch.equal(_bytes(tensor).cpu(), _bytes(self.copy))
        return torch.equal(self.live, self.words)


def _form(tensor: Tensor) -> _Form:
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return tensor.dtype, tensor.shape, tensor.device, strides


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _words(tensor: Tensor) -> Tensor | None:
    """A view of the memory as the widest integers that fit, which are compared eight times faster than bytes."""
    plain = tensor.detach().as_subclass(Tensor)
    if not plain.is_contiguous() or plain.storage_offset():
        return None
    flat = plain.view(-1)
    for width, dtype in ((8, torch.int64), (4, torch.int32)):
        if flat.nbytes % width == 0:
            return flat.view(dtype)
    return flat.view(torch.uint8)


def _fingerprint(tensor: Tensor, chunk: int = 2**22) -> int:
    """A number that differs for different bytes: for one changed word surely, for more almost surely.

    Words of eight bytes times odd weights, summed modulo 2**64 in integers, so the order of summation on a GPU
    does not matter.
    """
    raw = _bytes(tensor)
    whole = raw.numel() // 8 * 8
    words, rest = raw[:whole].clone().view(torch.int64), raw[whole:].to(torch.int64)
    longest = min(chunk, max(words.numel(), rest.numel()))
    weights = torch.arange(longest, device=raw.device, dtype=torch.int64) * 2 + 1
    total = 0
    for part in (*torch.split(words, chunk), rest):
        total = (total * 0x9E3779B97F4A7C15 + int((part * weights[: part.numel()]).sum())) % 2**64
    return total


def _is_packed(tensor: Tensor) -> bool:
    return bool(getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False))
