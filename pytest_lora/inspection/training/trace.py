"""Run training on a model and put everything back, bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.inspection.bitsandbytes_internals import keep_packing
from pytest_lora.inspection.state.precision import Float32Precision
from pytest_lora.inspection.state.randomness import RandomStates

COPIED_BYTES = 256 * 2**20
"""Models up to this size are copied whole; of larger ones only what a training step can change."""


@dataclass(slots=True)
class _KeptTensor:
    tensor: Tensor
    data: Tensor
    copy: Tensor | None
    requires_grad: bool
    grad: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, copied: bool) -> _KeptTensor:
        data = tensor.data
        copied = copied and data.device.type != "meta"
        grad = tensor.grad if tensor.is_leaf else None
        return cls(tensor, data, data.clone() if copied else None, tensor.requires_grad, grad)

    def restore(self) -> None:
        tensor, data = self.tensor, self.data
        if _place(tensor) != _place(data):
            tensor.data = data
        if self.copy is not None:
            data.copy_(self.copy)
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _KeptContainer:
    """Contents of a dict, list, set or deque; they go back into the same object."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.items = list(container.items()) if isinstance(container, MutableMapping) else list(container)

    def restore(self) -> None:
        container = self.container
        if isinstance(container, MutableMapping):
            now = list(container.items())
            if len(now) != len(self.items) or any(
                a is not c or b is not d for (a, b), (c, d) in zip(now, self.items, strict=True)
            ):
                container.clear()
                container.update(self.items)
        elif isinstance(container, set):
            container.clear()
            container.update(self.items)
        else:
            container.clear()
            container.extend(self.items)


class Trace:
    """The state of a model and of what trains it, for putting back.

    Kept are parameters, buffers, gradients, ``requires_grad``, every attribute of every module (training flags
    and hooks among them), quantization states, the optimizer with all tensors it holds, scheduler, scaler, the
    random generators and torch's global settings.

    Args:
        model: The model.
        others: Optimizer, scheduler, scaler and whatever else has a ``state_dict``; None is passed over.
        generators: Random generators beside the global ones.
    """

    def __init__(
        self, model: nn.Module, others: Iterable[object] = (), generators: Iterable[torch.Generator] = ()
    ) -> None:
        self._tensors: dict[int, _KeptTensor] = {}
        self._containers: dict[int, _KeptContainer] = {}
        self._settings = _Settings(generators)
        for other in others:
            self._keep_object(other)
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        copied = size <= COPIED_BYTES
        for module in model.modules():
            self._keep_module(module, copied)

    def before(self, tensor: Tensor) -> Tensor | None:
        """The values that a tensor had, or None if they were not copied."""
        kept = self._tensors.get(id(tensor))
        return kept.copy if kept else None

    def clear_gradients(self) -> None:
        """Take all gradients away until they are restored, so that none is added to or overwritten."""
        for kept in self._tensors.values():
            if kept.grad is not None:
                kept.tensor.grad = None

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for container in self._containers.values():
                container.restore()
            for tensor in self._tensors.values():
                tensor.restore()
        self._settings.restore()

    def _keep_module(self, module: nn.Module, copied: bool) -> None:
        state = vars(module)
        self._keep_container(state)
        for value in state.values():
            if isinstance(value, (dict, list, set, deque)):
                self._keep_container(value)
            elif isinstance(value, Tensor):
                self._keep_tensor(value, True)
        for parameter in module._parameters.values():
            if parameter is not None:
                self._keep_tensor(parameter, copied or parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                self._keep_tensor(buffer, True)
        quantization = state.get("state")
        if type(quantization).__name__ == "MatmulLtState":
            self._keep_container(vars(quantization))

    def _keep_tensor(self, tensor: Tensor, copied: bool) -> None:
        if id(tensor) in self._tensors:
            return
        self._tensors[id(tensor)] = _KeptTensor.of(tensor, copied)
        attributes = getattr(tensor, "__dict__", None)
        if attributes:
            self._keep_container(attributes)
            quantization = attributes.get("quant_state")
            while quantization is not None:  # nested where the scales are quantized too
                self._keep_container(vars(quantization))
                quantization = getattr(quantization, "state2", None)

    def _keep_container(self, container: Any) -> bool:
        """Keep the contents; False if they are kept already."""
        if id(container) in self._containers:
            return False
        self._containers[id(container)] = _KeptContainer(container)
        return True

    def _keep_object(self, value: object) -> None:
        """Keep a value with everything below it, but no model."""
        if isinstance(value, Tensor):
            self._keep_tensor(value, True)
        elif isinstance(value, dict):
            if self._keep_container(value):
                for item in list(value.values()):
                    self._keep_object(item)
        elif isinstance(value, (list, set, deque)):
            if self._keep_container(value):
                for item in list(value):
                    self._keep_object(item)
        elif isinstance(value, tuple):
            for item in value:
                self._keep_object(item)
        elif hasattr(value, "state_dict") and not isinstance(value, (nn.Module, type)):
            self._keep_object(vars(value))


class _Settings:
    """Random generators and torch's global settings."""

    def __init__(self, generators: Iterable[torch.Generator]) -> None:
        self._random = RandomStates()
        self._generators = [(g, g.get_state()) for g in generators]
        self._grad = torch.is_grad_enabled()
        self._dtype = torch.get_default_dtype()
        self._deterministic = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        self._anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        self._precision = Float32Precision()
        self._autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        }

    def restore(self) -> None:
        self._random.restore()
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_grad_enabled(self._grad)
        torch.set_default_dtype(self._dtype)
        enabled, warn_only = self._deterministic
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        anomaly, check_nan = self._anomaly
        torch.autograd.set_detect_anomaly(anomaly, check_nan)
        self._precision.restore()
        for device, (enabled, dtype) in self._autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


@contextmanager
def traceless(
    model: nn.Module, others: Iterable[object] = (), generators: Iterable[torch.Generator] = ()
) -> Iterator[Trace]:
    """Everything done to the model and to ``others`` inside is undone at the end, also after an error.

    Inside, gradients are on and empty, and 4-bit weights are never repacked.
    """
    trace = Trace(model, others, generators)
    try:
        trace.clear_gradients()
        keep_packing(model)
        with torch.inference_mode(False), torch.enable_grad():
            yield trace
    finally:
        trace.restore()
