"""Adapters that are called like a module of the model, and what PEFT makes of their names."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from pytest_lora.facts.model import CollidingName
from pytest_lora.inspection.peft_internals import WRAPPERS, adapter_names, factors, xlora_models
from pytest_lora.inspection.peft_state import saved_state
from pytest_lora.inspection.survey import Survey

_OF_PEFT = ("base_model", "model", "base_layer", "weight", "lora")
"""Parts of keys beside the names of modules; names that begin with ``lora_`` are those of factors."""


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
