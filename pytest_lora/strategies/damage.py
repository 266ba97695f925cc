"""Ways to damage a saved adapter, by the name of the rule that must report each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytest_lora.bases.examples.folders import (
    CONFIG,
    WEIGHTS,
    Tensors,
    configure,
    cut,
    edit,
    pickle_weights,
    remove,
    rename,
)

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True, slots=True)
class Damage:
    """One way in which a folder is damaged.

    Attributes:
        do: Damages the folder. The number says where, counted round and round.
        possible: Whether an adapter of this configuration can be damaged so.
    """

    do: Callable[[Path, int], object]
    possible: Callable[[LoraConfig], bool] = lambda config: True


def _cut_somewhere(name: str) -> Callable[[Path, int], Path]:
    def do(path: Path, at: int) -> Path:
        return cut(path, name, 1 + at % (path / name).stat().st_size)

    return do


def _factors(tensors: Tensors) -> list[str]:
    return sorted(name for name in tensors if "lora_A" in name or "lora_B" in name)


def _to_one_factor(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[Path, int], Path]:
    """Changes one factor; the number says where in it."""

    def do(path: Path, at: int) -> Path:
        def changed(tensors: Tensors) -> Tensors:
            names = _factors(tensors)
            name = names[at % len(names)]
            return {**tensors, name: change(tensors[name], at // len(names))}

        return edit(path, changed)

    return do


def _nan(tensor: torch.Tensor, at: int) -> torch.Tensor:
    tensor.flatten()[at % tensor.numel()] = float("nan")
    return tensor


def _lose_a_factor(path: Path, at: int) -> Path:
    def changed(tensors: Tensors) -> Tensors:
        names = _factors(tensors)
        return {name: tensor for name, tensor in tensors.items() if name != names[at % len(names)]}

    return edit(path, changed)


def _twice(path: Path, at: int) -> Path:
    def changed(tensors: Tensors) -> Tensors:
        names = _factors(tensors)
        name = names[at % len(names)]
        stem, dot, end = name.rpartition(".")
        double = f"{stem}.default.{end}" if end == "weight" else f"{stem}{dot}{end}.default"
        return {**tensors, double: tensors[name]}

    return edit(path, changed)


def _without_update(path: Path, at: int) -> Path:
    return edit(path, lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()})


def _other_rank(path: Path, at: int) -> Path:
    rank = json.loads((path / CONFIG).read_text())["r"]
    return configure(path, r=rank + 1 + at)


def _saves_modules(config: LoraConfig) -> bool:
    return bool(config.modules_to_save)


DAMAGES = {
    "weights_are_missing": Damage(lambda path, at: remove(path, WEIGHTS)),
    "config_is_missing": Damage(lambda path, at: remove(path, CONFIG)),
    "file_is_not_readable": Damage(_cut_somewhere(WEIGHTS)),
    "config_is_not_readable": Damage(_cut_somewhere(CONFIG)),
    "weights_are_pickled": Damage(lambda path, at: pickle_weights(path)),
    "weights_are_sharded": Damage(
        lambda path, at: rename(path, WEIGHTS, "adapter_model-00001-of-00002.safetensors")
    ),
    "config_field_is_unusable": Damage(lambda path, at: configure(path, r=-at)),
    "config_lacks_fields": Damage(lambda path, at: configure(path, lora_alpha=None)),
    "file_holds_no_adapter": Damage(lambda path, at: edit(path, lambda tensors: {})),
    "key_prefix_is_wrong": Damage(
        lambda path, at: edit(path, lambda tensors: {f"module.{k}": v for k, v in tensors.items()})
    ),
    "factor_is_missing": Damage(_lose_a_factor),
    "saved_module_is_not_in_the_file": Damage(
        lambda path, at: edit(path, lambda tensors: {k: v for k, v in tensors.items() if "lora_" in k}),
        _saves_modules,
    ),
    "key_is_there_twice": Damage(_twice),
    "rank_differs_from_config": Damage(_other_rank, lambda config: not config.rank_pattern),
    "tensor_is_empty": Damage(_to_one_factor(lambda tensor, at: tensor.new_empty(0))),
    "dtype_is_not_floating": Damage(_to_one_factor(lambda tensor, at: tensor.to(torch.int8))),
    "saved_adapter_is_not_finite": Damage(_to_one_factor(_nan)),
    "saved_adapter_holds_no_update": Damage(_without_update),
    "base_name_is_missing": Damage(lambda path, at: configure(path, base_model_name_or_path=None)),
}
"""The damage that a rule must name, the simplest first."""
