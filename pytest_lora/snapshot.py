"""The state of a model, taken, compared and put back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

COPIED_BYTES = 256 * 2**20
"""Tensors of models up to this size are copied, so that they can be put back; of larger ones fingerprints are kept."""

_REGISTRIES = ("_modules", "_parameters", "_buffers")
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Damage:
    """What differs in a way that no test should leave behind: names of tensors or modules, by kind."""

    merged: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    differing: frozenset[str] = frozenset()
    """Every tensor that differs, also those where that is no damage."""

    def __bool__(self) -> bool:
        return bool(self.merged or self.layers or self.replaced or self.contents)


class Snapshot:
    """The state of a module and all below it.

    It holds every module's attributes (children, parameters, buffers, hooks, flags), every tensor's contents,
    dtype, shape, device, ``requires_grad``, gradient and hooks, quantization states, and configurations.

    Args:
        model: The module.
        sharing: A snapshot taken earlier. Contents of tensors that still are what they were then are left to it:
            restore that one first.
    """

    def __init__(self, model: nn.Module, *, sharing: Snapshot | None = None) -> None:
        self.model = model
        self._modules = {
            name: (module, _Attributes.of(module), type(module)) for name, module in model.named_modules()
        }
        self._tensors: dict[int, _TensorState] = {}
        self._holders: dict[int, _Attributes] = {}
        self._configs: dict[int, _ConfigState] = {}
        self._by_id = {id(entry[0]): entry for entry in self._modules.values()}
        found = list(self._walk())
        size = sum(tensor.nbytes for _, tensor, _ in found)
        self.copied = size <= COPIED_BYTES
        for name, tensor, owner in found:
            known = sharing._tensors.get(id(tensor)) if sharing else None
            shared = known.content if known and known.is_intact() else None
            content = shared or _Content.of(tensor, self.copied)
            self._tensors[id(tensor)] = _TensorState.of(name, tensor, owner, content, shared is not None)

    def _walk(self) -> Iterator[tuple[str, Tensor, nn.Module]]:
        """Yield each tensor with its name and owner; note configurations and quantization states on the way."""
        seen: set[int] = set()
        for prefix, (module, attributes, _) in self._modules.items():
            for value in attributes.plain_values():
                if callable(getattr(value, "to_dict", None)) and not isinstance(value, nn.Module):
                    self._configs.setdefault(id(value), _ConfigState(value, copy.deepcopy(vars(value))))
            registered = {**module._parameters, **module._buffers}
            for key, tensor in registered.items():
                if tensor is None or id(tensor) in seen:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                for label, part in ((name, tensor), *self._quantization(name, tensor)):
                    if id(part) not in seen:
                        seen.add(id(part))
                        yield label, part, module

    def _quantization(self, name: str, holder: object, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that a quantized weight keeps beside its values: scales, codes, offsets."""
        attributes = getattr(holder, "__dict__", None)
        if attributes is None or isinstance(holder, nn.Module) or id(holder) in self._holders or not depth:
            return
        self._holders[id(holder)] = _Attributes.of(holder)
        for key, value in list(attributes.items()):
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value
            elif type(value).__module__.startswith("bitsandbytes."):
                yield from self._quantization(f"{name}.{key}", value, depth - 1)

    def damage(self, allowed: Snapshot | None = None, *, trained: tuple[str, ...] = ()) -> Damage:
        """What a test changed that it should not have.

        PEFT's own layers on top of the recorded ones, flags, hooks, gradients and configurations are no damage.

        Args:
            allowed: Another state of the same tensors and modules, which is no damage either: that with an
                adapter put on.
            trained: Ends of names of tensors whose contents may differ.
        """
        layers: list[str] = []
        replaced: list[str] = []
        merged: list[str] = []
        for name, (module, attributes, cls) in self._modules.items():
            other = allowed._by_id.get(id(module)) if allowed else None
            if type(module) is not cls and (other is None or type(module) is not other[2]):
                layers.append(name)
            for registry, key, value in attributes.replaced_entries(module):
                full = f"{name}.{key}" if name else key
                if _is_peft(value):
                    merged.extend(_merged_layers(full, value))
                elif other is None or other[1].entry(registry, key) is not value:
                    (layers if registry == "_modules" else replaced).append(full)
        differing = [state for state in self._tensors.values() if not state.is_intact()]
        repacked = tuple(f"{state.name}." for state in self._tensors.values() if state.is_repacked())
        contents = [
            state.name
            for state in differing
            if not state.is_changed_by_library()
            and not f"{state.name}.".startswith(repacked)
            and not state.name.endswith(trained)
            and not (allowed and allowed._holds(state.tensor))
        ]
        names = frozenset(state.name for state in differing)
        return Damage(tuple(merged), tuple(layers), tuple(replaced), tuple(contents), names)

    def restore(self, differing: frozenset[str] | None = None) -> bool:
        """Put everything back.

        Args:
            differing: Tensors that are known to differ, so that the others need not be compared again.

        Returns:
            Whether the model is now what it was, bit for bit. False if contents of a model too large to copy
            changed.
        """
        for module, attributes, cls in self._modules.values():
            if type(module) is not cls:
                module.__class__ = cls
            attributes.restore(module)
        for attributes in self._holders.values():
            attributes.restore(attributes.owner)
        for config in self._configs.values():
            config.restore()
        lost = [
            state.name
            for state in self._tensors.values()
            if not state.restore(differing is None or state.name in differing)
        ]
        return not lost

    def _holds(self, tensor: Tensor) -> bool:
        state = self._tensors.get(id(tensor))
        return state is not None and state.is_intact()


@dataclass(frozen=True, slots=True)
class _Attributes:
    """The attributes of an object, and what its containers (children, hooks, ...) held."""

    owner: Any
    values: dict[str, Any]
    containers: dict[str, Any]

    @classmethod
    def of(cls, owner: object) -> _Attributes:
        values = dict(vars(owner))
        containers = {
            key: copy.copy(value)
            for key, value in values.items()
            if isinstance(value, (MutableMapping, MutableSequence, MutableSet))
            and not isinstance(value, nn.Module)
        }
        return cls(owner, values, containers)

    def plain_values(self) -> Iterator[Any]:
        yield from self.values.values()
        for key, container in self.containers.items():
            if isinstance(container, MutableMapping) and key not in _REGISTRIES:
                yield from container.values()

    def entry(self, registry: str, key: str) -> Any:
        return self.containers[registry].get(key, _ABSENT)

    def replaced_entries(self, module: nn.Module) -> Iterator[tuple[str, str, Any]]:
        """Yield registry, name and new value of each child, parameter or buffer that is another object now."""
        for registry in _REGISTRIES:
            before, now = self.containers[registry], getattr(module, registry)
            for key in {**before, **now}:
                value = now.get(key, _ABSENT)
                # Rotary embeddings register their frequencies anew for longer sequences.
                derived = registry == "_buffers" and key in self.containers["_non_persistent_buffers_set"]
                if before.get(key, _ABSENT) is not value and not (derived and value is not _ABSENT):
                    yield registry, key, value

    def restore(self, owner: Any) -> None:
        now = vars(owner)
        if len(now) != len(self.values) or not all(map(is_, now.values(), self.values.values())):
            now.clear()
            now.update(self.values)
        for key, before in self.containers.items():
            container = self.values[key]
            if container or before:  # most are hooks, and empty
                _refill(container, before)


def _refill(container: Any, before: Any) -> None:
    """Put a container's elements back in place, as handles of hooks refer to the container itself."""
    if isinstance(container, MutableMapping):
        same = list(container) == list(before) and all(map(is_, container.values(), before.values()))
        if not same:
            container.clear()
            container.update(before)
    elif isinstance(container, MutableSequence):
        if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
            container[:] = before
    elif container != before:
        container.clear()
        for element in before:
            container.add(element)


@dataclass(frozen=True, slots=True)
class _ConfigState:
    config: Any
    values: dict[str, Any]

    def restore(self) -> None:
        if _differ(vars(self.config), self.values):
            vars(self.config).clear()
            vars(self.config).update(copy.deepcopy(self.values))


def _differ(now: object, before: object) -> bool:
    try:
        return now != before
    except (RuntimeError, ValueError):  # arrays in them have no truth value
        return True


@dataclass(frozen=True, slots=True)
class _Content:
    """A tensor's bytes: a copy in CPU memory, or a fingerprint."""

    copy: Tensor | None
    fingerprint: int | None

    @classmethod
    def of(cls, tensor: Tensor, copied: bool) -> _Content:
        if tensor.is_meta:
            return cls(None, None)
        if copied:
            return cls(tensor.detach().to("cpu", copy=True), None)
        return cls(None, _fingerprint(tensor))

    def equals(self, tensor: Tensor) -> bool:
        if self.copy is not None:
            return torch.equal(_words(tensor).cpu(), _words(self.copy))
        return self.fingerprint is None or self.fingerprint == _fingerprint(tensor)


@dataclass(frozen=True, slots=True)
class _TensorState:
    name: str
    tensor: Tensor
    owner: nn.Module
    content: _Content
    form: tuple[torch.dtype, torch.Size, torch.device]
    requires_grad: bool
    grad: Tensor | None
    packed: bool
    is_shared: bool
    hooks: dict[str, dict[int, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, tensor: Tensor, owner: nn.Module, content: _Content, is_shared: bool
    ) -> _TensorState:
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
                _refill(now, before)
        if self.is_shared or not look or self.is_intact():
            return True
        if self.content.copy is None:
            return False
        if _form(tensor) == self.form:
            tensor.data.copy_(self.content.copy)
        else:
            tensor.data = self.content.copy.to(self.form[2], copy=True)
        return self.is_intact()


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return tensor.dtype, tensor.shape, tensor.device


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _words(tensor: Tensor) -> Tensor:
    """The bytes as the widest integers that fit, which are compared eight times faster than bytes."""
    if tensor.is_contiguous() and tensor.dim() and tensor.storage_offset() == 0:
        for width, dtype in ((8, torch.int64), (4, torch.int32)):
            if tensor.shape[-1] * tensor.itemsize % width == 0:
                return tensor.detach().view(dtype)
    return _bytes(tensor)


def _fingerprint(tensor: Tensor, chunk: int = 2**22) -> int:
    """A number that differs for different bytes: for one changed word surely, for more almost surely.

    Words of eight bytes times odd weights, summed modulo 2**64 in integers, so the order of summation on a GPU
    does not matter.
    """
    raw = _bytes(tensor)
    whole = raw.numel() // 8 * 8
    words, rest = raw[:whole].clone().view(torch.int64), raw[whole:].to(torch.int64)
    weights = torch.arange(chunk, device=raw.device, dtype=torch.int64) * 2 + 1
    total = 0
    for part in (*torch.split(words, chunk), rest):
        total = (total * 0x9E3779B97F4A7C15 + int((part * weights[: part.numel()]).sum())) % 2**64
    return total


def _is_packed(tensor: Tensor) -> bool:
    return bool(getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False))


def _is_peft(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "peft"


def _merged_layers(prefix: str, layer: Any) -> Iterator[str]:
    for name, module in layer.named_modules(prefix=prefix):
        if _is_peft(module) and getattr(module, "merged", False) is True:
            yield name
