"""The adapters of one model beside its modules and each other: names that collide, shared tensors, sums of others."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pytest_lora.facts.model import CollidingName, CombinedAdapter
from pytest_lora.inspection.peft_internals import (
    WRAPPERS,
    Factors,
    LoraConfig,
    LoraLayer,
    active_adapters,
    adapter_names,
    factors,
    further_tensors,
    xlora_models,
)
from pytest_lora.inspection.peft_state import saved_state
from pytest_lora.inspection.survey import Survey

_KINDS = ("use_rslora", "use_dora", "lora_bias", "kasa_config")
"""What a sum of factors does not carry (huggingface/peft issue 3761)."""

_SAME = 1e-4
"""Share of its length by which a sum of factors may miss what it is said to be: float32 on the way loses 1e-6."""

_OF_PEFT = ("base_model", "model", "base_layer", "weight", "lora")
"""Parts of keys beside the names of modules; names that begin with ``lora_`` are those of factors."""


def shared_adapters(lora: Mapping[str, LoraLayer]) -> tuple[tuple[str, str], ...]:
    """Pairs of adapters of which both factors are one tensor on every module that both are on."""
    return _pairs(lora, adapter_names, _is_one)


def equal_adapters(lora: Mapping[str, LoraLayer]) -> tuple[tuple[str, str], ...]:
    """Pairs of adapters that are active together on some module and hold the same numbers on all of those."""
    return _pairs(lora, _active_here, _are_equal)


def _active_here(layer: LoraLayer) -> list[str]:
    held = adapter_names(layer)
    return sorted(name for name in active_adapters(layer) if name in held)


def _pairs(
    lora: Mapping[str, LoraLayer],
    names: Callable[[LoraLayer], Iterable[str]],
    alike: Callable[[Tensor, Tensor], bool],
) -> tuple[tuple[str, str], ...]:
    """Pairs of adapters of which both factors are alike on every module that has both among its names."""
    found: dict[tuple[str, str], bool] = {}
    for layer in lora.values():
        for pair in itertools.combinations(names(layer), 2):
            if found.get(pair, True):
                first, second = (factors(layer, name) for name in pair)
                found[pair] = alike(first.a, second.a) and alike(first.b, second.b)
    return tuple(pair for pair, are_alike in found.items() if are_alike)


def _are_equal(first: Tensor, second: Tensor) -> bool:
    if first.device != second.device or first.is_meta or first.shape != second.shape:
        return False
    return first.dtype == second.dtype and torch.equal(first, second)


def _is_one(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    stored = first.device == second.device and not first.is_meta
    return stored and first.shape == second.shape and first.data_ptr() == second.data_ptr() != 0


def combined_adapters(
    lora: Mapping[str, LoraLayer], configs: Mapping[str, LoraConfig]
) -> Iterator[CombinedAdapter]:
    """Adapters that ``add_weighted_adapter`` summed of others whose kind it does not know, as their factors show.

    It scales the factors that it sums, and gives the sum ``lora_alpha = r``; rsLoRA, magnitudes and biases are copied
    from the first configuration, not combined. A copy of an adapter, and an average that keeps its alpha, are no such.
    """
    for at, (name, config) in enumerate(configs.items()):
        kinds = [kind for kind in _KINDS if getattr(config, kind, False)]
        before = list(configs)[:at]
        if config.lora_alpha != config.r or config.rank_pattern or not before:
            continue
        layers = [layer for layer in lora.values() if name in adapter_names(layer)]
        yield from _subtracted(layers, name, before)
        if not kinds:
            continue
        used = _summed(layers, name, before)
        first = configs[next(iter(used))] if used else config
        if len(used) > 1 and (first.r, first.lora_alpha) == (config.r, config.lora_alpha):
            continue
        if used and all(math.isclose(weight, 1.0, rel_tol=_SAME) for weight in used.values()):
            kinds = [k for k in kinds if k != "use_rslora" and not _alike(layers, name, next(iter(used)))]
        if used and kinds:
            yield CombinedAdapter(name, tuple(used), tuple(kinds), float(layers[0].scaling[name]))


def _alike(layers: list[LoraLayer], name: str, other: str) -> bool:
    """Whether two adapters hold the same numbers beside their factors wherever both are."""
    for layer in layers:
        own, theirs = (dict(further_tensors(layer, adapter)) for adapter in (name, other))
        if own.keys() == theirs.keys() and any(not torch.equal(own[part], theirs[part]) for part in own):
            return False
    return True


def _summed(layers: list[LoraLayer], name: str, others: list[str]) -> dict[str, float]:
    """Adapters of which another one is a sum on every module, with their share in it; empty where it is none."""
    found: dict[str, float] = {}
    for layer in layers:
        beside = {other: factors(layer, other) for other in others if other in adapter_names(layer)}
        own = factors(layer, name)
        if own.b.is_meta or own.b_name != "lora_B" or not bool(own.b.any()):
            return {}
        used = _weighted(own, beside) or _stacked(own.b, beside)
        if not used:
            return {}
        found |= used
    return found


def _stacked(b: Tensor, beside: dict[str, Factors]) -> dict[str, float]:
    """Adapters whose ``lora_B`` stands, as it is, in the columns of a wider one (``combination_type="cat"``)."""
    found: dict[str, float] = {}
    for name, (_, _, _, own, _) in beside.items():
        width = own.shape[-1]
        fits = own.ndim == 2 and own.shape[0] == b.shape[0] and width < b.shape[1] and bool(own.any())
        starts = range(b.shape[1] - width + 1) if fits else ()
        if any(torch.equal(b[:, at : at + width], own) for at in starts):
            found[name] = math.nan
    return found


def _subtracted(layers: list[LoraLayer], name: str, others: list[str]) -> Iterator[CombinedAdapter]:
    """An adapter whose two factors are sums by themselves, of which one takes something off.

    Their product has the products of unlike sources in it as well: ``(B1 - B2)(A1 + A2)`` is not
    ``B1 A1 - B2 A2`` (huggingface/peft issue 3004).
    """
    shares: dict[str, float] = {}
    meant = missed = 0.0
    for layer in layers:
        beside = {other: factors(layer, other) for other in others if other in adapter_names(layer)}
        own = factors(layer, name)
        beside = {n: f for n, f in beside.items() if _of_one_form(f, own)}
        if own.b_name != "lora_B" or own.b.is_meta or own.b.ndim != 2 or len(beside) < 2:
            return
        first = _shares(own.a, [f.a for f in beside.values()])
        second = _shares(own.b, [f.b for f in beside.values()])
        if first is None or second is None:
            return
        here = {n: a * b for n, a, b in zip(beside, first, second, strict=True)}
        if not shares and not any(share < -_SAME for share in here.values()):
            return  # what most adapters are, told by their first module
        shares = shares or here
        wanted = sum((here[n] * (f.b.detach().float() @ f.a.detach().float()) for n, f in beside.items()))
        update = own.b.detach().float() @ own.a.detach().float()
        meant += float(torch.linalg.vector_norm(wanted)) ** 2
        missed += float(torch.linalg.vector_norm(update - wanted)) ** 2
    used = tuple(n for n, share in shares.items() if abs(share) > _SAME)
    off = tuple(n for n in used if shares[n] < 0)
    if off and meant and len(used) > 1:
        yield CombinedAdapter(name, used, (), float(layers[0].scaling[name]), off, math.sqrt(missed / meant))


def _of_one_form(first: Factors, second: Factors) -> bool:
    pairs = ((first.a, second.a), (first.b, second.b))
    return all(one.shape == other.shape and one.device == other.device for one, other in pairs)


def _shares(own: Tensor, beside: list[Tensor]) -> list[float] | None:
    """The numbers that others have to be multiplied with to add up to a factor; None where they do not."""
    stacked = torch.stack([tensor.detach().float().flatten() for tensor in beside], 1)
    wanted = own.detach().float().flatten()[:, None]
    length = float(torch.linalg.vector_norm(wanted))
    if not length or not bool(stacked.isfinite().all()) or not math.isfinite(length):
        return None
    shares = torch.linalg.lstsq(stacked, wanted).solution
    missed = torch.linalg.vector_norm(stacked @ shares - wanted)
    return shares.flatten().tolist() if float(missed) <= _SAME * length else None


def _weighted(own: Factors, beside: dict[str, Factors]) -> dict[str, float]:
    """Adapters whose factors, both times the same numbers, add up to those of another (``"linear"``)."""
    alike = {n: f for n, f in beside.items() if f.a.shape == own.a.shape and f.b.shape == own.b.shape}
    alike = {n: f for n, f in alike.items() if bool(f.b.any())}
    if not alike:
        return {}
    weights = _shares(_as_one(own), [_as_one(f) for f in alike.values()])
    if weights is None:
        return {}
    return {name: weight for name, weight in zip(alike, weights, strict=True) if abs(weight) > _SAME}


def _as_one(pair: Factors) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in (pair.a, pair.b)])


def colliding_names(model: nn.Module, found: Survey) -> Iterator[CollidingName]:
    """Adapters whose name is also a part of a key; PEFT finds tensors of an adapter by its name in their keys.

    What that does differs between versions, so PEFT is asked what it would save.
    """
    parts = {*_OF_PEFT, *(part for module in found.lora for part in module.split("."))}
    names = tuple(dict.fromkeys(name for layer in found.lora.values() for name in adapter_names(layer)))
    called = [name for name in names if name in parts or name.startswith("lora_")]
    if not called or xlora_models(model):
        return  # X-LoRA itself calls its adapters by numbers, and loads each from its own folder
    holder = next((module for module in model.modules() if isinstance(module, WRAPPERS)), found.root)
    spoiled = {name: lost for name in names if (lost := tuple(_lost(holder, found, name)))}
    for name in called:
        module = next((m for m in found.lora if name in m.split(".")), name)
        yield CollidingName(
            name, module, tuple(key for keys in spoiled.values() for key in keys), tuple(spoiled)
        )


def _lost(holder: nn.Module, found: Survey, adapter: str) -> Iterator[str]:
    """Keys that should be in the file of an adapter and are not, and those that should not be there."""
    names = {id(p): name for name, p in holder.named_parameters()}
    layers = (layer for layer in found.lora.values() if adapter in adapter_names(layer))
    own = (names[id(p)] for layer in layers for p in (factors(layer, adapter).a, factors(layer, adapter).b))
    wanted = {re.sub(rf"\.(lora_\w+)\.{re.escape(adapter)}(?=\.|$)", r".\1", name) for name in own}
    try:
        written = {key for key in saved_state(holder, adapter) if "lora_" in key and "magnitude" not in key}
    except Exception:  # whatever PEFT makes of such names
        written = set()
    yield from sorted(wanted ^ written)
