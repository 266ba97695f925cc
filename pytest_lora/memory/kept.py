"""Predictors, each kept for the steps that share its base, adapter and setting, and what tells those from others."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.memory import StepSetting

if TYPE_CHECKING:
    from peft import LoraConfig

    from pytest_lora.inspection.memory.predictor import Predictor

_KEPT = 256
"""Predictors, some MB each: a search over targets comes back to those it has tried."""
_predictors: dict[Any, Predictor] = {}

_SCALES = ("r", "lora_alpha", "alpha_pattern", "use_rslora")
"""The rank is asked for at each point; the others are numbers that a layer multiplies by."""


def what_takes_memory(config: LoraConfig) -> dict[str, Any]:
    """The fields of an adapter that two steps must share to make the same storages."""
    from pytest_lora.inspection.rehearsal import READ_WEIGHTS

    fields = {name: value for name, value in vars(config).items() if name not in _SCALES}
    fields["lora_dropout"] = bool(config.lora_dropout)
    init = fields["init_lora_weights"]
    if init in (True, False, "gaussian") or str(init).lower().startswith(READ_WEIGHTS):
        fields["init_lora_weights"] = True
    return fields


def identity(value: Any) -> Hashable:
    """What tells one configuration from another: every attribute, private ones too (the attention, for one)."""
    if isinstance(value, Mapping):
        return frozenset((str(name), identity(part)) for name, part in value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(map(identity, value))
    if isinstance(value, (list, tuple)):
        return tuple(map(identity, value))
    if hasattr(value, "__dict__") and not isinstance(value, (type, Enum)):
        return type(value), identity(vars(value))
    return type(value), repr(value)


def predictor_for(base: Any, config: LoraConfig, setting: StepSetting) -> Predictor:
    """What predicts for a base, an adapter of any rank, and a setting; kept, as its traces are worth keeping.

    A live model may change, so that nothing is kept for it.
    """
    from transformers import PretrainedConfig

    from pytest_lora.inspection.memory.cut_bases import kept_for
    from pytest_lora.inspection.memory.predictor import Predictor

    if not isinstance(base, PretrainedConfig):
        return Predictor(base, config, setting)
    of_base = identity(base)
    key = (of_base, type(config), identity(what_takes_memory(config)), setting)
    if key not in _predictors:
        if len(_predictors) >= _KEPT:
            del _predictors[next(iter(_predictors))]
        _predictors[key] = Predictor(copy.deepcopy(base), copy.deepcopy(config), setting, kept_for(of_base))
    return _predictors[key]


def forget() -> None:
    """Trace anew whatever is asked for next: for those who change code of transformers between two estimates."""
    from pytest_lora.inspection.memory.cut_bases import kept_for

    _predictors.clear()
    kept_for.cache_clear()
