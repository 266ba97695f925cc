"""Each adapter on each module, as facts: its geometry, and on a live model its state and what its factors hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytest_lora.facts.config import LayerFacts
from pytest_lora.facts.model_parts import Factor, LayerState
from pytest_lora.inspection.base import dtype_name, logical_shape
from pytest_lora.inspection.peft_internals import (
    Factors,
    LoraLayer,
    active_adapters,
    adapter_names,
    factors,
    further_tensors,
    fused_parameter,
    groups_of,
    is_adalora,
    own_code,
    own_geometry,
)

CPU_NUMBERS = 1_000_000_000
"""Numbers of base weights that are read on a CPU at most; more would take seconds."""


class Values(NamedTuple):
    """What the values of one tensor show; None where there are none (meta device)."""

    zero: bool | None
    finite: bool | None
    largest: float | None


UNREAD = Values(None, None, None)


def read_values(tensors: Iterable[torch.Tensor | None]) -> dict[int, Values]:
    """Whether each tensor is all zero and all finite, by id, with one transfer a device."""
    pending: dict[torch.device, tuple[list[int], list[torch.Tensor]]] = {}
    for tensor in tensors:
        if tensor is None or not _readable(tensor):
            continue
        data = tensor.detach()
        ids, extremes = pending.setdefault(data.device, ([], []))
        ids.append(id(tensor))
        low, high = torch.aminmax(data)
        extremes.append(torch.stack((low, high)).float())
    found: dict[int, Values] = {}
    for ids, extremes in pending.values():
        stacked = torch.stack(extremes)
        for key, (low, high) in zip(ids, stacked.tolist(), strict=True):
            largest = max(-low, high)
            finite = math.isfinite(low) and math.isfinite(high)
            found[key] = Values(low == high == 0, finite, largest if finite else None)
    return found


def _readable(data: torch.Tensor) -> bool:
    if is_traceable_wrapper_subclass(data) or data.layout is not torch.strided:
        return False  # what torchao packs, say, has no extremes that torch could ask for
    wide_float = data.is_floating_point() and data.element_size() > 1
    sharded = hasattr(data, "to_local")  # the other ranks would have to take part
    return wide_float and not sharded and data.device.type != "meta" and data.numel() > 0


def layer_facts(layers: Iterable[tuple[str, LoraLayer]], adapter: str) -> Iterator[LayerFacts]:
    """The geometry of one adapter on every module that has it."""
    for module, layer in layers:
        if adapter in adapter_names(layer):
            pair, others = factors(layer, adapter), tuple(further_tensors(layer, adapter))
            yield LayerFacts(**_geometry(module, layer, adapter, pair, others))


def layer_states(
    layers: Iterable[tuple[str, LoraLayer]],
    rslora: frozenset[str] = frozenset(),
    registered: frozenset[type] = frozenset(),
) -> Iterator[LayerState]:
    """Every adapter on every module as it stands.

    Args:
        layers: LoRA layers, each with the name of what it adapts.
        rslora: Adapters whose configuration sets ``use_rslora``.
        registered: Classes of layers that a configuration registers for modules of its own.
    """
    found = [(m, layer, a, factors(layer, a)) for m, layer in layers for a in adapter_names(layer)]
    further = [tuple(further_tensors(layer, adapter)) for _, layer, adapter, _ in found]
    both = zip(found, further, strict=True)
    values = read_values(t for (_, _, _, f), others in both for t in (f.a, f.b, *(o for _, o in others)))
    filled = fills((f.a, f.b) for _, _, _, f in found if values.get(id(f.b), UNREAD).zero is False)
    for (module, layer, adapter, pair), others in zip(found, further, strict=True):
        geometry = _geometry(module, layer, adapter, pair, others)
        geometry["use_rslora"] |= adapter in rslora
        dropout = layer.lora_dropout[adapter]
        a_name, a, b_name, b, by_design = pair
        expected_a, expected_b = _expected_shapes(layer, adapter, geometry, pair)
        yield LayerState(
            **geometry,
            a=_factor(a_name, a, values, by_design),
            b=_factor(b_name, b, values, by_design),
            expected_a=expected_a,
            expected_b=expected_b,
            base_device=_base_device(layer, module),
            active=adapter in active_adapters(layer),
            disabled=bool(layer.disable_adapters),
            merged=adapter in layer.merged_adapters,
            dropout_live=bool(dropout.training and geometry["dropout"]),
            further=tuple(_factor(name, tensor, values, by_design) for name, tensor in others),
            own_code="" if type(layer) in registered else own_code(layer),
            swappable=isinstance(layer.scaling[adapter], torch.Tensor),
            normless=_normless(layer, pair, others, values),
            **filled.get(id(b), FULL)._asdict(),
        )


def _expected_shapes(
    layer: LoraLayer, adapter: str, geometry: dict[str, Any], pair: Factors
) -> tuple[tuple[int, int], tuple[int, int]]:
    """First two sizes of both factors; as they are stored where only PEFT knows what they should be."""
    stored = _first_two(pair.a), _first_two(pair.b)
    sharded = not (pair.a.numel() and pair.b.numel())
    if sharded or own_geometry(layer, adapter):
        return stored
    rank, inputs, outputs = geometry["rank"] * geometry["experts"], *_sizes(geometry)
    if pair.a_name == "lora_embedding_B":
        return (outputs, rank), (rank, inputs)
    groups = groups_of(layer)
    per_group = rank // groups if stored[1][1] == rank // groups else rank
    return (rank, inputs), (outputs, per_group)


def _sizes(geometry: dict[str, Any]) -> tuple[int, int]:
    return geometry["in_features"], geometry["out_features"]


def _normless(
    layer: LoraLayer, pair: Factors, others: tuple[tuple[str, Tensor], ...], values: dict[int, Values]
) -> int:
    """Rows whose norm DoRA divides by and that are zero: the magnitude is the norm of the base weight at first."""
    if not others:
        return 0
    magnitude = next((tensor for name, tensor in others if name == "lora_magnitude_vector"), None)
    outputs = pair.b.shape[0] if pair.b.ndim == 2 else 0
    if magnitude is None or magnitude.shape != (outputs,) or id(magnitude) not in values:
        return 0
    rows = (magnitude.detach() == 0) & ~pair.b.detach().any(1)
    if not bool(rows.any()):
        return 0
    weight = getattr(layer.get_base_layer(), "weight", None)
    if isinstance(weight, Tensor) and _readable(weight):
        weight = weight.detach().T if getattr(layer, "fan_in_fan_out", False) else weight.detach()
        rows &= ~weight.to(rows.device).any(1)
    return int(rows.sum())


def _first_two(tensor: torch.Tensor) -> tuple[int, int]:
    sizes = (*tensor.shape, 0, 0)
    return sizes[0], sizes[1]


def _factor(name: str, tensor: torch.Tensor, values: dict[int, Values], by_design: tuple[str, ...]) -> Factor:
    zero, finite, largest = values.get(id(tensor), UNREAD)
    return Factor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        device=str(tensor.device),
        trainable=tensor.requires_grad,
        zero=zero,
        finite=finite,
        largest=largest,
        frozen_by_design=name in by_design,
        is_inference=tensor.is_inference(),
    )


def _geometry(
    module: str, layer: LoraLayer, adapter: str, pair: Factors, others: tuple[tuple[str, torch.Tensor], ...]
) -> dict[str, Any]:
    fused = fused_parameter(layer)
    base = layer.get_base_layer()
    shape = None if fused else logical_shape(base)
    inputs, outputs = shape or (int(layer.in_features or 0), int(layer.out_features or 0))
    use_dora = adapter in layer.lora_magnitude_vector
    tensors = (pair.a, pair.b, *(tensor for _, tensor in others))
    rank, scaling = int(layer.r[adapter]), float(layer.scaling[adapter])
    return {
        "module": module,
        "kind": "Parameter" if fused else type(base).__name__,
        "adapter": adapter,
        "in_features": inputs,
        "out_features": outputs,
        "kernel": math.prod(getattr(base, "kernel_size", ())) if shape else 1,
        "experts": fused[1] if fused else 1,
        "rank": rank,
        "alpha": float(layer.lora_alpha[adapter]),
        "scaling": scaling / rank if rank and is_adalora(layer) else scaling,
        "use_rslora": _uses_rslora(layer, adapter),
        "use_dora": use_dora,
        "dropout": float(getattr(layer.lora_dropout[adapter], "p", 0.0)),
        "parameters": sum(tensor.numel() for tensor in tensors),
    }


def _uses_rslora(layer: LoraLayer, adapter: str) -> bool:
    known = getattr(layer, "use_rslora", None)
    if known is not None:
        return bool(known.get(adapter, False))
    # Older PEFT keeps no record on the layer, but the scaling shows it.
    rank, alpha, scaling = layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter]
    return bool(rank > 1 and alpha and math.isclose(scaling, alpha / math.sqrt(rank)))


def _base_device(layer: LoraLayer, module: str) -> str:
    base: nn.Module = layer.get_base_layer()
    name = module.rpartition(".")[2] if fused_parameter(layer) else "weight"
    weight = getattr(base, name, None)
    if weight is None:
        weight = next(base.parameters(), None)
    return "" if weight is None else str(weight.device)


class Fill(NamedTuple):
    """What is at zero in two factors whose product is not.

    Attributes:
        empty_ranks: Ranks at which both factors are zero.
        idle_ranks: Ranks at which the factor that starts at zero still is, and the random one is not.
        zero_outputs: Rows of the factor that starts at zero which still are, where they are one block at an end.
    """

    empty_ranks: int
    idle_ranks: int
    zero_outputs: int


FULL = Fill(0, 0, 0)


def fills(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Fill]:
    """The fill of pairs ``(a, b)`` of matrices, ``(rank, in)`` and ``(out, rank)``, by the id of ``b``.

    There is one transfer a device.
    """
    pending: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
    for a, b in pairs:
        if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.device == b.device:
            held = b.detach() != 0
            marks = torch.cat(((a.detach() != 0).any(1), held.any(0), held.any(1)))
            pending.setdefault(b.device, []).append((id(b), a.shape[0], marks))
    found: dict[int, Fill] = {}
    for entries in pending.values():
        found_marks: list[bool] = torch.cat([marks for _, _, marks in entries]).tolist()
        start = 0
        for key, rank, own in entries:
            found[key] = _fill(found_marks[start : start + len(own)], rank)
            start += len(own)
    return found


def _fill(marks: list[bool], rank: int) -> Fill:
    a, b, outputs = marks[:rank], marks[rank : 2 * rank], marks[2 * rank :]
    return Fill(
        empty_ranks=sum(not x and not y for x, y in zip(a, b, strict=True)),
        idle_ranks=sum(x and not y for x, y in zip(a, b, strict=True)),
        zero_outputs=_block(outputs),
    )


def _block(outputs: list[bool]) -> int:
    """How many are False, where these are the first or the last ones; else 0."""
    zero = len(outputs) - sum(outputs)
    return zero if not any(outputs[:zero]) or not any(outputs[len(outputs) - zero :]) else 0
