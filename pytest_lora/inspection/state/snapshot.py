"""The state of a model, taken, compared and put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.inspection.state.attributes import AttributeBatch, Attributes
from pytest_lora.inspection.state.damage import Damage, is_peft, merged_layers
from pytest_lora.inspection.state.memory import OpaqueTensorError, memory_of
from pytest_lora.inspection.state.reachable import Reachable
from pytest_lora.inspection.state.tensors import (
    Content,
    Contents,
    TensorState,
)

COPIED_BYTES = 256 * 2**20
"""Tensors of models up to this size are copied, so that they can be put back; of larger ones fingerprints are kept."""


class Snapshot:
    """The state of a module and all below it.

    It holds every module's attributes (children, parameters, buffers, hooks, flags), every tensor's contents,
    dtype, shape, device, ``requires_grad``, gradient and hooks, quantization states, configurations, and what hooks
    train.

    Args:
        model: The module.
        others: What else is to be kept with all that it holds: an optimizer, batches.
        sharing: A snapshot taken earlier. Contents of tensors that still are what they were then are left to it:
            restore that one first.
        to_train: Keep what training changes whatever the size: trainable parameters, buffers and gradients.
        values: Whether contents are kept at all.

    Attributes:
        copied: Whether the contents of all tensors were copied; else fingerprints show which changed.
        opaque: Tensors whose contents cannot be kept, by their names, and why.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *others: object,
        sharing: Snapshot | None = None,
        to_train: bool = False,
        values: bool = True,
    ) -> None:
        self.opaque: dict[str, str] = {}
        self._values = values
        self._sharing = sharing
        self._modules = {
            name: (module, Attributes.of(name or "model", module), type(module))
            for name, module in (model.named_modules() if model is not None else ())
        }
        self._tensors: dict[int, TensorState] = {}
        self._by_id = {id(entry[0]): entry for entry in self._modules.values()}
        self._reached = Reachable()
        self.copied = self._keep_registered(to_train)
        self._keep_reached(others, to_train)
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
            AttributeBatch([*self._reached.objects, self._reached.containers()]),
        )

    def _keep_registered(self, to_train: bool) -> bool:
        """Take parameters and buffers; gives whether all of them are copied."""
        found = [(n, t, owner, self._memory(n, t)) for n, t, owner in self._registered()]
        all_copied = sum(part.nbytes for *_, parts in found for _, part in parts) <= COPIED_BYTES
        for name, tensor, owner, parts in found:
            trains = to_train and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
            self._keep(name, tensor, owner, parts, copied=all_copied or trains)
            if to_train:
                self._keep_gradient(name, tensor, copied=all_copied)
        return all_copied

    def _keep_reached(self, others: tuple[object, ...], to_train: bool) -> None:
        """Take what attributes, hooks and other objects hold."""
        for _, attributes, _ in self._modules.values():
            self._reached.add_values(attributes)
        for state in list(self._tensors.values()):
            for _, hooks in state.hooks.values():
                for hook in hooks.values():
                    self._reached.add(f"a hook of {state.name}", hook)
        for other in others:
            self._reached.add(type(other).__name__, other)
        for name, tensor in self._reached.tensors.values():
            if id(tensor) not in self._tensors:
                self._keep(name, tensor, None, self._memory(name, tensor), copied=True)
                if to_train:
                    self._keep_gradient(name, tensor, copied=True)

    def _registered(self) -> Iterator[tuple[str, Tensor, nn.Module]]:
        """Yield each parameter and buffer, and the tensors that quantized ones have beside their values."""
        seen: set[int] = set()
        for prefix, (module, _, _) in self._modules.items():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or id(tensor) in seen:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                for label, part in ((name, tensor), *self._quantization(name, tensor)):
                    if id(part) not in seen:
                        seen.add(id(part))
                        yield label, part, module

    def _quantization(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that a quantized weight keeps beside its values: scales, codes, offsets."""
        before = len(self._reached.tensors)
        self._reached.add(name, tensor)
        for label, part in list(self._reached.tensors.values())[before:]:
            if part is not tensor:
                yield label, part

    def _memory(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The parts of a tensor whose contents are to be kept."""
        if not self._values:
            return []
        try:
            return list(memory_of(tensor))
        except OpaqueTensorError as error:
            self.opaque[name] = str(error)
            return []

    def _keep(
        self,
        name: str,
        tensor: Tensor,
        owner: nn.Module | None,
        parts: list[tuple[str, Tensor]],
        *,
        copied: bool,
    ) -> None:
        known = self._sharing._tensors.get(id(tensor)) if self._sharing else None
        if known is not None and known.is_intact():
            self._tensors[id(tensor)] = TensorState.of(name, tensor, owner, known.content, is_shared=True)
            return
        whole = any(part is tensor for _, part in parts)
        content = Content.of(tensor, copied) if whole else None
        self._tensors[id(tensor)] = TensorState.of(name, tensor, owner, content)
        for label, part in () if whole else parts:
            state = TensorState.of(f"{name}{label}", part, owner, Content.of(part, copied))
            self._tensors[id(part)] = state

    def _keep_gradient(self, name: str, tensor: Tensor, *, copied: bool) -> None:
        gradient = tensor.grad if tensor.is_leaf else None
        if gradient is not None and id(gradient) not in self._tensors:
            label = f"{name}.grad"
            self._keep(label, gradient, None, self._memory(label, gradient), copied=copied)

    def before(self, tensor: Tensor) -> Tensor | None:
        """The values that a tensor had, in CPU memory; None if they were not copied."""
        state = self._tensors.get(id(tensor))
        return state.content.copy if state and state.content else None

    def clear_gradients(self) -> None:
        """Take all gradients away, so that none is added to or overwritten; ``restore`` gives them back."""
        for state in self._tensors.values():
            if state.grad is not None:
                state.tensor.grad = None

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
                if is_peft(value):
                    merged.extend(merged_layers(full, value))
                elif other is None or other[1].entry(registry, key) is not value:
                    (layers if registry == "_modules" else replaced).append(full)
        with torch._C.DisableTorchFunctionSubclass():  # it slows down every look at a quantized weight
            differing = self._contents.differing()
        repacked = tuple(f"{state.name}." for state in differing if state.is_repacked())
        contents = [
            state.name
            for state in differing
            if state.owner is not None
            and not state.is_changed_by_library()
            and not f"{state.name}.".startswith(repacked)
            and not state.name.endswith(trained)
            and not (allowed and allowed._holds(state.tensor))
        ]
        names = frozenset(state.name for state in differing)
        return Damage(tuple(merged), tuple(layers), tuple(replaced), tuple(contents), names)

    def restore(self, differing: frozenset[str] | None = None) -> list[str]:
        """Put back what a comparison by value shows to be changed, all at once; for models that are put back often.

        Args:
            differing: Tensors that are known to differ, so that the others need not be compared again.

        Returns:
            The names of what is not what it was, bit for bit: contents of a model too large to copy, and what refuses
            to be changed.
        """
        lost = self._restore_kinds()
        for batch in self._batches:
            lost += [name for attributes in batch.changed() for name in attributes.restore()]
        with torch._C.DisableTorchFunctionSubclass():
            if differing is None:
                differing = frozenset(state.name for state in self._own_contents.differing())
            suspects = list(self._tensors.values())
            if self._settings() == self._settings_before:
                suspects = [state for state in suspects if state.name in differing] if differing else []
            # A gradient fits only a tensor that has its shape back.
            lost += _attempted((s.name, s.restore_contents) for s in suspects if s.name in differing)
            lost += _attempted((s.name, s.restore_settings) for s in suspects)
        return lost

    def restore_all(self) -> list[str]:
        """Put everything back, each attribute by identity and each tensor into its own memory; else as ``restore``."""
        lost = self._restore_kinds()
        for batch in self._batches:
            lost += [name for attributes in batch.all for name in attributes.restore()]
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            lost += _attempted((s.name, s.restore_contents) for s in self._tensors.values())
            lost += _attempted((s.name, s.restore_settings) for s in self._tensors.values())
        return lost

    def _restore_kinds(self) -> list[str]:
        """Put back what kind of module each is: ``__class__`` can be set."""
        return _attempted(
            (name, partial(setattr, module, "__class__", cls))
            for name, (module, _, cls) in self._modules.items()
            if type(module) is not cls
        )

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


def _attempted(steps: Iterable[tuple[str, Callable[[], object]]]) -> list[str]:
    """Take all steps, and name those that failed: a step gives False, or raises what only its object knows."""
    failed = []
    for name, step in steps:
        try:
            if step() is False:
                failed.append(name)
        except Exception:
            failed.append(name)
    return failed
