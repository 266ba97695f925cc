"""Each adapter on each module, as facts: its geometry, and on a live model its state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from pytest_lora.facts.config import LayerFacts
from pytest_lora.facts.model import Factor, LayerState
from pytest_lora.inspection.base import dtype_name, logical_shape
from pytest_lora.inspection.peft_internals import (
    Factors,
    LoraLayer,
    active_adapters,
    adapter_names,
    factors,
    fused_parameter,
)

CPU_NUMBERS = 1_000_000_000
"""Numbers of base weights that are read on a CPU at most; more would take seconds."""


class Values(NamedTuple):
    """What the values of one tensor show; None where there are none (meta device)."""

    zero: bool | None
    finite: bool | None


UNREAD = Values(None, None)


def read_values(tensors: Iterable[torch.Tensor]) -> dict[int, Values]:
    """Whether each tensor is all zero and all finite, by id, with one transfer a device."""
    pending: dict[torch.device, tuple[list[int], list[torch.Tensor]]] = {}
    for tensor in tensors:
        data = tensor.detach()
        if (
            data.device.type == "meta"
            or not data.is_floating_point()
            or data.element_size() < 2
            or not data.numel()
        ):
            continue
        ids, extremes = pending.setdefault(data.device, ([], []))
        ids.append(id(tensor))
        low, high = torch.aminmax(data)
        extremes.append(torch.stack((low, high)).float())
    found: dict[int, Values] = {}
    for ids, extremes in pending.values():
        stacked = torch.stack(extremes)
        finite = stacked.isfinite().all(dim=1).tolist()
        zero = (stacked == 0).all(dim=1).tolist()
        found.update((i, Values(z, f)) for i, z, f in zip(ids, zero, finite, strict=True))
    return found


def _readable(data: torch.Tensor) -> bool:
    wide_float = data.is_floating_point() and data.element_size() > 1
    return wide_float and data.device.type != "meta" and data.numel() > 0


def layer_facts(lora: dict[str, LoraLayer], adapter: str) -> Iterator[LayerFacts]:
    """The geometry of one adapter on every module that has it."""
    for module, layer in lora.items():
        if adapter in adapter_names(layer):
            yield LayerFacts(**_geometry(module, layer, adapter, factors(layer, adapter)))


def layer_states(lora: dict[str, LoraLayer]) -> Iterator[LayerState]:
    """Every adapter on every module as it stands."""
    found = [(m, layer, a, factors(layer, a)) for m, layer in lora.items() for a in adapter_names(layer)]
    values = read_values(t for _, _, _, f in found for t in (f.a, f.b))
    for module, layer, adapter, pair in found:
        geometry = _geometry(module, layer, adapter, pair)
        rank = geometry["rank"] * geometry["experts"]
        dropout = layer.lora_dropout[adapter]
        a_name, a, b_name, b, by_design = pair
        inputs, outputs = geometry["in_features"], geometry["out_features"]
        embedding = a_name == "lora_embedding_B"
        yield LayerState(
            **geometry,
            a=_factor(a_name, a, values, by_design),
            b=_factor(b_name, b, values, by_design),
            expected_a=(outputs, rank) if embedding else (rank, inputs),
            expected_b=(rank, inputs) if embedding else (outputs, rank // _groups(layer)),
            base_device=_base_device(layer, module),
            active=adapter in active_adapters(layer),
            disabled=bool(layer.disable_adapters),
            merged=adapter in layer.merged_adapters,
            dropout_live=bool(dropout.training and geometry["dropout"]),
        )


def _factor(name: str, tensor: torch.Tensor, values: dict[int, Values], by_design: tuple[str, ...]) -> Factor:
    zero, finite = values.get(id(tensor), UNREAD)
    return Factor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        device=str(tensor.device),
        trainable=tensor.requires_grad,
        zero=zero,
        finite=finite,
        frozen_by_design=name in by_design,
    )


def _geometry(module: str, layer: LoraLayer, adapter: str, pair: Factors) -> dict[str, Any]:
    fused = fused_parameter(layer)
    base = layer.get_base_layer()
    shape = None if fused else logical_shape(base)
    inputs, outputs = shape or (int(layer.in_features or 0), int(layer.out_features or 0))
    use_dora = adapter in layer.lora_magnitude_vector
    numbers = pair.a.numel() + pair.b.numel()
    if use_dora:
        numbers += sum(p.numel() for p in layer.lora_magnitude_vector[adapter].parameters(recurse=False))
    return {
        "module": module,
        "kind": "Parameter" if fused else type(base).__name__,
        "adapter": adapter,
        "in_features": inputs,
        "out_features": outputs,
        "kernel": math.prod(getattr(base, "kernel_size", ())) if shape else 1,
        "experts": fused[1] if fused else 1,
        "rank": int(layer.r[adapter]),
        "alpha": float(layer.lora_alpha[adapter]),
        "scaling": float(layer.scaling[adapter]),
        "use_rslora": _uses_rslora(layer, adapter),
        "use_dora": use_dora,
        "dropout": float(getattr(layer.lora_dropout[adapter], "p", 0.0)),
        "parameters": numbers,
    }


def _uses_rslora(layer: LoraLayer, adapter: str) -> bool:
    """What the layer remembers; PEFT 0.17 remembers only the scaling, which tells from rank 2 on."""
    remembered: Any = getattr(layer, "use_rslora", None)
    if remembered is not None:
        return bool(remembered.get(adapter, False))
    rank, alpha, scaling = layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter]
    return rank > 1 and math.isclose(scaling, alpha / math.sqrt(rank))


def _groups(layer: LoraLayer) -> int:
    """Groups of an adapted convolution: PEFT gives them to ``lora_B`` alone, so that each sees its share."""
    groups: Any = getattr(layer.get_base_layer(), "groups", 1)
    return groups if isinstance(groups, int) else 1


def _base_device(layer: LoraLayer, module: str) -> str:
    base: nn.Module = layer.get_base_layer()
    name = module.rpartition(".")[2] if fused_parameter(layer) else "weight"
    weight = getattr(base, name, None)
    if weight is None:
        weight = next(base.parameters(), None)
    return "" if weight is None else str(weight.device)
