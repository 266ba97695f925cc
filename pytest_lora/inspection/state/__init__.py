"""The state of a model, taken, compared and put back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.inspection.state.attributes import AttributeBatch, Attributes, ConfigState
from pytest_lora.inspection.state.tensors import Content, Contents, TensorState

COPIED_BYTES = 256 * 2**20
"""Tensors of models up to this size are copied, so that they can be put back; of larger ones fingerprints are kept."""


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
            name: (module, Attributes.of(module), type(module)) for name, module in model.named_modules()
        }
        self._tensors: dict[int, TensorState] = {}
        self._holders: dict[int, Attributes] = {}
        self._configs: dict[int, ConfigState] = {}
        self._by_id = {id(entry[0]): entry for entry in self._modules.values()}
        found = list(self._walk())
        size = sum(tensor.nbytes for _, tensor, _ in found)
        self.copied = size <= COPIED_BYTES
        for name, tensor, owner in found:
            known = sharing._tensors.get(id(tensor)) if sharing else None
            shared = known.content if known and known.is_intact() else None
            content = shared or Content.of(tensor, self.copied)
            self._tensors[id(tensor)] = TensorState.of(name, tensor, owner, content, shared is not None)
        self._settings_before = self._settings()
        states = list(self._tensors.values())
        self._contents = Contents(states)
        own = [state for state in states if not state.is_shared]
        self._own_contents = Contents(own) if len(own) < len(states) else self._contents
        # The other snapshot is restored first, so modules that are alike in both need no look. Those that are not
        # surely have changed; apart from them, the rest mostly compares equal at once.
        both = sharing._by_id if sharing else {}
        pairs = [(attributes, both.get(key)) for key, (_, attributes, _) in self._by_id.items()]
        self._batches = (
            AttributeBatch([a for a, other in pairs if other and not a.same_as(other[1])]),
            AttributeBatch([a for a, other in pairs if not other]),
            AttributeBatch(list(self._holders.values())),
        )

    def _walk(self) -> Iterator[tuple[str, Tensor, nn.Module]]:
        """Yield each tensor with its name and owner; note configurations and quantization states on the way."""
        seen: set[int] = set()
        for prefix, (module, attributes, _) in self._modules.items():
            for value in attributes.plain_values():
                if callable(getattr(value, "to_dict", None)) and not isinstance(value, nn.Module):
                    self._configs.setdefault(id(value), ConfigState(value, copy.deepcopy(vars(value))))
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
        self._holders[id(holder)] = Attributes.of(holder)
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
