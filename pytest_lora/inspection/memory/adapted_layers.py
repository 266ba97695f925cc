"""Which layers a configuration adapts alike: PEFT is asked, before layers that are like others are left out."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")


def is_numbered(name: str) -> bool:
    """Whether a name means one layer by its number."""
    return bool(_NUMBERED.search(name))


def same_in_every_layer(config: LoraConfig) -> bool:
    """Whether a configuration cannot tell one layer from another by its number."""
    by_number = config.layers_to_transform or config.layer_replication or config.rank_pattern
    targets = config.target_modules
    expressions = isinstance(config.exclude_modules, str) or (
        isinstance(targets, str) and targets != "all-linear"
    )
    names = [config.exclude_modules, targets, *_other_names(config)]
    return not (by_number or expressions or any(map(is_numbered, _listed(*names))))


def marks(config: LoraConfig) -> Callable[[str], Hashable] | None:
    """What a configuration does to a module, by its name in the base; None where that cannot be asked.

    Two layers whose modules have the same marks are adapted alike.
    """
    if config.layer_replication or any(map(is_numbered, _listed(*_other_names(config)))):
        return None
    if same_in_every_layer(config):
        return lambda name: None
    tuners: Any = importlib.import_module("peft.tuners.tuners_utils")
    patterns: Any = importlib.import_module("peft.utils.other")
    asked = copy.copy(config)
    if asked.target_modules == "all-linear":
        asked.target_modules = ".*"  # of all linear layers it only leaves some out
    ranks: dict[str, int] = config.rank_pattern or {}

    def mark(name: str) -> Hashable:
        taken = bool(tuners.check_target_module_exists(asked, name))
        return taken and (True, ranks.get(patterns.get_pattern_key(ranks.keys(), name)))

    return mark


def _other_names(config: LoraConfig) -> tuple[Any, Any]:
    return config.modules_to_save, getattr(config, "target_parameters", None)


def _listed(*groups: Any) -> list[str]:
    return [name for group in groups if group and not isinstance(group, str) for name in group]
