"""Facts made by hand: a base, and a configuration on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoraConfig

from pytest_lora.facts.base import BaseFacts, BaseModule
from pytest_lora.facts.config import ConfigFacts, LayerFacts, NameMatch
from pytest_lora.facts.settings import Settings

BASE = BaseFacts(
    architecture="Llama",
    task_type=None,
    modules=(),
    module_names=("model.layers.0.q", "model.layers.1.q", "embed", "lm_head"),
    parameters=100,
    layer_indices=(0, 1),
    heads=(),
    tied=(),
    input_embeddings="embed",
    output_embeddings="lm_head",
    vocab_size=100,
    has_biases=False,
    float_dtypes=(),
    device_types=(),
    quantization=None,
    carries_adapter=False,
    fused=(),
)


def settings(**fields: Any) -> Settings:
    return Settings.of(LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q"], **fields}))


def module(name: str, kind: str = "Linear", quantization: str | None = None, size: int = 64) -> BaseModule:
    return BaseModule(name, kind, size, size, quantization)


def layer(name: str = "layers.0.q", **changes: Any) -> LayerFacts:
    """An adapter of rank 8 and alpha 16 on a matrix of 64 by 64; its scaling follows rank and alpha."""
    made = LayerFacts(name, "Linear", "default", 64, 64, 1, 1, 8, 16, 2.0, False, False, 0.0, 1024)
    made = replace(made, **changes)
    return made if "scaling" in changes else replace(made, scaling=made.configured_scaling)


def config(
    *layers: LayerFacts,
    base: dict[str, Any] | None = None,
    known: dict[str, Any] | None = None,
    **fields: Any,
) -> ConfigFacts:
    """A configuration of these fields, whose adapters are these layers; ``known`` are other facts about it."""
    return ConfigFacts(
        **{
            "adapter": "default",
            "settings": settings(**fields),
            "base": replace(BASE, **(base or {})),
            "layers": layers,
            "names": (),
            "patterns": (),
            "saved_modules": (),
            "token_modules": (),
            "refusal": None,
            "live": False,
            **(known or {}),
        }
    )


def target(
    name: str, *modules: str, similar: tuple[str, ...] = (), field: str = "target_modules"
) -> NameMatch:
    return NameMatch(field, name, modules, similar)
