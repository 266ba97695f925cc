"""Tensors: contents, form, gradients and hooks, taken, compared and put back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.inspection.state.attributes import refill
from pytest_lora.inspection.state.memory import memory_of

_SMALL_BYTES = 2**17
"""Up to this size, calling a comparison costs more than comparing, so that such tensors are compared together."""
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_Form = tuple[torch.dtype, torch.Size, torch.device, tuple[int, ...]]
_Hooks = dict[str, tuple[Any, dict[int, Any]]]


def same_contents(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of any kind hold the same bytes, wherever they lie."""
    one, two = dict(memory_of(first)), dict(memory_of(second))
    return one.keys() == two.keys() and all(_same_bytes(part, two[name]) for name, part in one.items())


def _same_bytes(one: Tensor, two: Tensor) -> bool:
    return (one.dtype, one.shape) == (two.dtype, two.shape) and torch.equal(
        _bytes(one).cpu(), _bytes(two).cpu()
    )


@dataclass(frozen=True, slots=True)
class TensorState:
    """A tensor as it was.

    Attributes:
        owner: The module that registers it; None for one of an attribute, an optimizer or a part of a tensor.
        data: Its memory, which it gets back where it was given another.
        content: What was in that memory; None where it is held by parts of it, or not kept.
        is_shared: Whether another snapshot puts the contents back.
    """

    name: str
    tensor: Tensor
    owner: nn.Module | None
    data: Tensor
    content: Content | None
    form: _Form
    requires_grad: bool
    grad: Tensor | None
    packed: bool
    is_shared: bool
    hooks: _Hooks = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        tensor: Tensor,
        owner: nn.Module | None,
        content: Content | None,
        is_shared: bool = False,
    ) -> TensorState:
        hooks: _Hooks = {}
        for key in _TENSOR_HOOKS:
            held = getattr(tensor, key, None)
            hooks[key] = held, dict(held or {})
        return cls(
            name=name,
            tensor=tensor,
            owner=owner,
            data=tensor.data,
            content=content,
            form=_form(tensor),
            requires_grad=tensor.requires_grad,
            grad=tensor.grad if tensor.is_leaf else None,
            packed=_is_packed(tensor),
            is_shared=is_shared,
            hooks=hooks,
        )

    def is_intact(self) -> bool:
        return _form(self.tensor) == self.form and (self.content is None or self.content.equals(self.tensor))

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

    def restore_settings(self) -> None:
        """Put back all but the contents."""
        tensor = self.tensor
        for key, (held, before) in self.hooks.items():
            now = getattr(tensor, key, None)
            if now is not None and dict(now) != before:
                refill(now, before)
            if now is not held:
                setattr(tensor, key, held)
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad

    def restore_contents(self) -> bool:
        """Put the contents back; False where they changed and were not copied."""
        tensor, data = self.tensor, self.data
        # A sparse tensor has no place: its indices and values may have become others.
        if tensor.layout is not torch.strided or _place(tensor) != _place(data):
            tensor.data = data
        if self.is_shared or self.content is None or self.is_intact():
            return True
        if self.content.copy is None:
            return False
        data.copy_(self.content.copy)
        return self.is_intact()


class Contents:
    """Contents of many tensors: the small ones in CPU memory are compared at once."""

    def __init__(self, states: list[TensorState]) -> None:
        kept = [(state, state.content) for state in states if state.content is not None]
        self._small = [s for s, c in kept if c.live is not None and s.tensor.nbytes <= _SMALL_BYTES]
        small = set(map(id, self._small))
        self._others = [state for state in states if id(state) not in small]
        self._tensors = [state.tensor for state in self._small]
        with torch._C.DisableTorchFunctionSubclass():
            self._places = self._now()
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for state, content in kept:
            if id(state) in small and content.live is not None and content.words is not None:
                live, words = kinds.setdefault(content.words.dtype, ([], []))
                live.append(content.live)
                words.append(content.words)
        self._joined = [(live, torch.cat(words)) for live, words in kinds.values()]

    def _now(self) -> list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]:
        return [_place(t) for t in self._tensors]

    def differing(self) -> list[TensorState]:
        """The tensors that are not what they were."""
        suspects = self._others
        if self._now() != self._places or not all(torch.equal(torch.cat(a), b) for a, b in self._joined):
            suspects = suspects + self._small
        return [state for state in suspects if not state.is_intact()]


@dataclass(frozen=True, slots=True)
class Content:
    """A dense tensor's bytes: a copy in CPU memory, or a fingerprint.

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
        if not copied:
            return cls(None, _fingerprint(tensor))
        before = tensor.detach().to("cpu", copy=True)
        live = _words(tensor) if tensor.device.type == "cpu" else None
        return cls(before, None, live, _words(before), tensor.data_ptr())

    def equals(self, tensor: Tensor) -> bool:
        if self.copy is None:
            return self.fingerprint == _fingerprint(tensor)
        if self.live is None or self.words is None or self.address != tensor.data_ptr():
            return torch.equal(_bytes(tensor).cpu(), _bytes(self.copy))
        return torch.equal(self.live, self.words)


def _form(tensor: Tensor) -> _Form:
    plain = tensor.layout is torch.strided and not tensor.is_nested
    return (
        tensor.dtype,
        tensor.shape if plain else torch.Size(),
        tensor.device,
        tensor.stride() if plain else (),
    )


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    """Where a tensor lies and how it is read; of one without memory of its own only its dtype."""
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    except RuntimeError:
        return 0, tensor.dtype, torch.Size(), ()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _words(tensor: Tensor) -> Tensor | None:
    """A view of the memory as the widest integers that fit, which are compared eight times faster than bytes."""
    plain = tensor.detach().as_subclass(Tensor)
    if not plain.is_contiguous() or plain.storage_offset() or plain.is_conj() or plain.is_neg():
        return None
    flat = plain.view(-1)
    for width, dtype in ((8, torch.int64), (4, torch.int32)):
        if flat.nbytes % width == 0:
            return flat.view(dtype)
    return flat.view(torch.uint8)


def _fingerprint(tensor: Tensor) -> int:
    """A number that differs for different bytes: for one changed word surely, for more almost surely.

    Words of eight bytes times odd weights, summed modulo 2**64 in integers, so the order of summation on a GPU
    does not matter. On a CPU the parts fit its cache: 0.25 s a GiB on one core.
    """
    raw = _bytes(tensor)
    chunk = 2**16 if raw.device.type == "cpu" else 2**22
    whole = raw.numel() // 8 * 8
    head = raw[:whole]
    words = (head.clone() if head.storage_offset() % 8 else head).view(torch.int64)
    rest = raw[whole:].to(torch.int64)
    longest = min(chunk, max(words.numel(), rest.numel()))
    weights = torch.arange(longest, device=raw.device, dtype=torch.int64) * 2 + 1
    product = torch.empty_like(weights)
    total = 0
    for part in (*torch.split(words, chunk), rest):
        size = part.numel()
        torch.mul(part, weights[:size], out=product[:size])
        total = (total * 0x9E3779B97F4A7C15 + int(product[:size].sum())) % 2**64
    return total


def _is_packed(tensor: Tensor) -> bool:
    return bool(getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False))
