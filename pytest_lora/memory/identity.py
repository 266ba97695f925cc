"""What tells one base or adapter from another, where memory is concerned."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

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
