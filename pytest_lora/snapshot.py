"""The state of a model, taken, compared and put back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from dataclasses import dataclass, field
from functools import cache
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

COPIED_BYTES = 256 * 2**20
"""Tensors of models up to this size are copied, so that they can be put back; of larger ones fingerprints are kept."""

_REGISTRIES = ("_modules", "_parameters", "_buffers")
_TENSOR_REGISTRIES = ("_parameters", "_buffers")
_ABSENT = object()
_SMALL_BYTES = 2**17
"""Up to this size, calling a comparison costs more than comparing, so that such tensors are compared together."""


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
        self._settings_before = self._settings()
        states = list(self._tensors.values())
        self._contents = _Contents(states)
        own = [state for state in states if not state.is_shared]
        self._own_contents = _Contents(own) if len(own) < len(states) else self._contents
        # The other snapshot is restored first, so modules that are alike in both need no look. Those that are not
        # surely have changed; apart from them, the rest mostly compares equal at once.
        both = sharing._by_id if sharing else {}
        pairs = [(attributes, both.get(key)) for key, (_, attributes, _) in self._by_id.items()]
        self._batches = (
            _Batch([a for a, other in pairs if other and not a.same_as(other[1])]),
            _Batch([a for a, other in pairs if not other]),
            _Batch(list(self._holders.values())),
        )

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
        with torch._C.DisableTorchFunctionSubclass():  # it slows down every look at a quantized weight
            differing = self._contents.differing()
        repacked = tuple(f"{state.name}." for state in differing if state.is_repacked())
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
        for module, _, cls in self._modules.values():
            if type(module) is not cls:
                module.__class__ = cls
        for batch in self._batches:
            for attributes in batch.changed():
                attributes.restore()
        for config in self._configs.values():
            config.restore()
        with torch._C.DisableTorchFunctionSubclass():
            if differing is None:
                differing = frozenset(state.name for state in self._own_contents.differing())
            suspects = list(self._tensors.values())
            if self._settings() == self._settings_before:
                suspects = [state for state in suspects if state.name in differing] if differing else []
            lost = [state.name for state in suspects if not state.restore(state.name in differing)]
        return not lost

    def _settings(self) -> tuple[list[bool], list[int], list[tuple[int, list[int]]]]:
        """``requires_grad``, gradients and hooks of all tensors, to compare them at once."""
        tensors: list[Any] = [state.tensor for state in self._tensors.values()]
        hooks = [
            (id(registry), list(map(id, registry.values())))
            for tensor in tensors
            for registry in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
            if registry
        ]
        return [t.requires_grad for t in tensors], [id(t.grad) for t in tensors if t.is_leaf], hooks

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

    def same_as(self, other: _Attributes) -> bool:
        """Whether all attributes are the same objects, with the same elements."""
        pairs = [
            (self.values, other.values),
            *((c, other.containers.get(k)) for k, c in self.containers.items()),
        ]
        return all(_same_elements(one, two) for one, two in pairs)

    def entry(self, registry: str, key: str) -> Any:
        return self.containers[registry].get(key, _ABSENT)

    def replaced_entries(self, module: nn.Module) -> Iterator[tuple[str, str, Any]]:
        """Yield registry, name and new value of each child, parameter or buffer that is another object now."""
        attributes = vars(module)
        for registry in _REGISTRIES:
            before, now = self.containers[registry], attributes[registry]
            if not before and not now:
                continue
            if (
                len(before) == len(now)
                and all(map(is_, before.values(), now.values()))
                and [*before] == [*now]
            ):
                continue
            for key in {**before, **now}:
                value = now.get(key, _ABSENT)
                # Rotary embeddings register their frequencies anew for longer sequences.
                derived = registry == "_buffers" and key in self.containers["_non_persistent_buffers_set"]
                if before.get(key, _ABSENT) is not value and not (derived and value is not _ABSENT):
                    yield registry, key, value

    def restore(self) -> None:
        now = vars(self.owner)
        if not _same_elements(now, self.values):
            now.clear()
            now.update(self.values)
        for key, before in self.containers.items():
            container = self.values[key]
            if container or before:  # most are hooks, and empty
                _refill(container, before)


class _Batch:
    """Attributes of many objects, compared at once: several times faster than one by one."""

    def __init__(self, attributes: list[_Attributes]) -> None:
        self._all = attributes
        held = [(a, key, a.values[key], before) for a in attributes for key, before in a.containers.items()]
        # Most containers are for hooks, and empty: to ask for that needs no look at what they held before.
        self._empty = [now for _, _, now, before in held if not before]
        self._owners_of_empty = [a for a, _, _, before in held if not before]
        filled = [entry for entry in held if entry[3]]
        # Tensors are told apart by identity: comparing them by value gives tensors.
        tensors = [(a, now) for a, key, now, _ in filled if key in _TENSOR_REGISTRIES]
        self._owners_of_tensors = [a for a, _ in tensors]
        self._registries = [registry for _, registry in tensors]
        self._registered = list(map(_identities, self._registries))
        others = [(a, now, before) for a, key, now, before in filled if key not in _TENSOR_REGISTRIES]
        dicts = [*((a, vars(a.owner), a.values) for a in attributes), *others]
        self._owners = [a for a, _, _ in dicts]
        self._now = [now for _, now, _ in dicts]
        self._before = [before for _, _, before in dicts]

    def changed(self) -> list[_Attributes]:
        """Those that are not what they were; one may come twice."""
        registered = list(map(_identities, self._registries))
        changed: list[_Attributes] = []
        try:
            if any(self._empty):
                changed += [a for a, now in zip(self._owners_of_empty, self._empty, strict=True) if now]
            if self._now != self._before:
                changed += _differing(self._owners, self._now, self._before)
            if registered != self._registered:
                changed += _differing(self._owners_of_tensors, registered, self._registered)
        except (RuntimeError, ValueError):  # a tensor or an array in the place of something else
            return self._all
        return changed


def _differing(owners: list[_Attributes], now: list[Any], before: list[Any]) -> list[_Attributes]:
    return [owner for owner, one, two in zip(owners, now, before, strict=True) if one != two]


def _identities(registry: dict[str, Any]) -> list[tuple[str, int]]:
    return [(key, id(value)) for key, value in registry.items()]


def _same_elements(one: Any, two: Any) -> bool:
    """Whether two containers hold the same objects under the same keys, in the same order."""
    if two is None or len(one) != len(two) or not all(map(is_, one, two)):
        return False
    return not isinstance(one, MutableMapping) or all(map(is_, one.values(), two.values()))


def _refill(container: Any, before: Any) -> None:
    """Put a container's elements back in place, as handles of hooks refer to the container itself."""
    if _same_elements(container, before):
        return
    container.clear()
    if isinstance(container, MutableMapping):
        container.update(before)
    elif isinstance(container, MutableSequence):
        container.extend(before)
    else:
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
    def of(cls, tensor: Tensor, copied: bool) -> _Content:
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


class _Contents:
    """Contents of many tensors: the small ones in CPU memory are compared at once."""

    def __init__(self, states: list[_TensorState]) -> None:
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

    def differing(self) -> list[_TensorState]:
        """The tensors that are not what they were."""
        suspects = self._others
        if self._now() != self._places or not all(torch.equal(torch.cat(a), b) for a, b in self._joined):
            suspects = suspects + self._small
        return [state for state in suspects if not state.is_intact()]


@dataclass(frozen=True, slots=True)
class _TensorState:
    name: str
    tensor: Tensor
    owner: nn.Module
    content: _Content
    form: _Form
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


_Form = tuple[torch.dtype, torch.Size, torch.device, tuple[int, ...]]


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


def _is_peft(value: object) -> bool:
    return _is_in_peft(type(value).__module__)


@cache
def _is_in_peft(module: str) -> bool:
    return module.partition(".")[0] == "peft"


def _merged_layers(name: str, layer: Any) -> Iterator[str]:
    if getattr(layer, "merged", False) is True:
        yield name
    for key, child in layer._modules.items():
        if _is_peft(child):
            yield from _merged_layers(f"{name}.{key}", child)
