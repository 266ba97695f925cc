"""Predictors, each kept for the steps that share its base, adapter and setting."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.memory import StepSetting
from pytest_lora.memory.identity import identity, what_takes_memory

if TYPE_CHECKING:
    from peft import LoraConfig

    from pytest_lora.inspection.memory.predictor import Predictor

_KEPT = 256
"""Predictors, some MB each: a search over targets comes back to those it has tried."""
_predictors: dict[Any, Predictor] = {}


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
