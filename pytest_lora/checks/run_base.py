"""The base and the adapter that the setting of a run means, each made once for all recipes that name it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.recipe import RecipeFacts, RunSetting

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from pytest_lora.facts.config import ConfigFacts


def known_base(base: Any, facts: RecipeFacts, folder: Path) -> Any:
    """The base as something that a base can be made of; None where its shape is not known."""
    from pytest_lora.inspection.public_bases import declared, find_shape
    from pytest_lora.inspection.recipe.beside import Tree
    from pytest_lora.inspection.skeleton import named_or_read

    named = base if base is not None else facts.setting and facts.setting.base.value
    if not isinstance(named, str):
        return named
    if named in declared or find_shape(named) is not None:
        return named
    if base is not None:
        named_or_read(named)  # refuses, by the argument's name, a base that is not there
        return named
    return Tree(folder).base(named)


def adapter_of(setting: RunSetting, base: Any) -> LoraConfig | None:
    """The configuration that the tool makes of the setting; None where it sets none up."""
    from pytest_lora.inspection.public_bases import find_shape
    from pytest_lora.inspection.recipe.adapter import COLLECTING, linear_names, lora_config

    shape = find_shape(base) if isinstance(base, str) else None
    several = shape is not None and "vision_config" in shape.config
    config = lora_config(setting, several_modalities=several)
    collects = setting.tool in COLLECTING and isinstance(base, str)
    if config is not None and config.target_modules == "all-linear" and collects:
        model = _built(base, str(config.task_type), False)
        config.target_modules = "all-linear" if model is None else linear_names(model)
    return config


def facts_on_base(config: LoraConfig, base: Any, whole: bool) -> ConfigFacts | None:
    """What PEFT makes of the adapter; None where the installed transformers cannot build the base."""
    from pytest_lora.inspection.config import config_facts

    try:
        return (
            config_facts(config, base)
            if not isinstance(base, str)
            else _remembered(base, _Adapter(config), whole)
        )
    except ValueError:
        return None


class _Adapter:
    """A configuration that equals another with the same fields."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        fields = {k: sorted(v) if isinstance(v, set) else v for k, v in vars(config).items()}
        self.text = repr(sorted(fields.items()))

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Adapter) and self.text == other.text


@lru_cache(maxsize=32)
def _remembered(base: str, adapter: _Adapter, whole: bool) -> ConfigFacts:
    from pytest_lora.inspection.config import config_facts
    from pytest_lora.inspection.memory.layer_stacks import same_in_every_layer

    cut = not whole and same_in_every_layer(adapter.config)
    model = _built(base, str(adapter.config.task_type), cut)
    return config_facts(adapter.config, base if model is None else model)


@lru_cache(maxsize=8)
def _built(base: str, task_type: str, cut: bool) -> nn.Module | None:
    """A base by name without weights, and without the inner layers that are like their neighbours; recipes name few."""
    from pytest_lora.inspection.memory.layer_stacks import cut_stacks
    from pytest_lora.inspection.skeleton import resolve_base

    try:
        model = resolve_base(base, task_type.rpartition(".")[2])
    except ValueError:
        return None
    if cut:
        cut_stacks(model)
    return model
