"""Ways to damage a saved adapter, by the code of the rule that must name each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Damage:
    """One way in which a folder is damaged.

    Attributes:
        do: Damages the folder. The number says where, counted round and round.
        possible: Whether an adapter of this configuration can be damaged so.
    """

    do: Callable[[Path, int], object]
    possible: Callable[[LoraConfig], bool] = lambda config: True


def configure(path: Path, **fields: Any) -> Path:
    """Set fields of the configuration; None takes a field out."""
    file = path / CONFIG
    written = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in written.items() if value is not None}))
    return path


def edit(path: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Write the tensors anew, changed."""
    changed = change(load_file(path / WEIGHTS))
    save_file({name: tensor.clone().contiguous() for name, tensor in changed.items()}, path / WEIGHTS)
    return path


def cut(path: Path, name: str, by: int) -> Path:
    """Take bytes off the end of a file."""
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-by])
    return path


def remove(path: Path, name: str) -> Path:
    """Remove a file."""
    (path / name).unlink()
    return path


def rename(path: Path, name: str, to: str) -> Path:
    """Rename a file."""
    (path / name).rename(path / to)
    return path


def pickle_weights(path: Path) -> Path:
    """Put a pickle in the place of the safetensors file."""
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    return remove(path, WEIGHTS)


def _cut_somewhere(name: str) -> Callable[[Path, int], Path]:
    def do(path: Path, at: int) -> Path:
        return cut(path, name, 1 + at % (path / name).stat().st_size)

    return do


def _factors(tensors: Tensors) -> list[str]:
    return sorted(name for name in tensors if "lora_A" in name or "lora_B" in name)


def _to_one_factor(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[Path, int], Path]:
    """Changes one factor, and tells the change where in it."""

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
    "LORA402": Damage(lambda path, at: remove(path, WEIGHTS)),
    "LORA411": Damage(lambda path, at: remove(path, CONFIG)),
    "LORA401": Damage(_cut_somewhere(WEIGHTS)),
    "LORA412": Damage(_cut_somewhere(CONFIG)),
    "LORA403": Damage(lambda path, at: pickle_weights(path)),
    "LORA404": Damage(lambda path, at: rename(path, WEIGHTS, "adapter_model-00001-of-00002.safetensors")),
    "LORA413": Damage(lambda path, at: configure(path, r=-at)),
    "LORA414": Damage(lambda path, at: configure(path, lora_alpha=None)),
    "LORA421": Damage(lambda path, at: edit(path, lambda tensors: {})),
    "LORA422": Damage(
        lambda path, at: edit(path, lambda tensors: {f"module.{k}": v for k, v in tensors.items()})
    ),
    "LORA423": Damage(_lose_a_factor),
    "LORA426": Damage(
        lambda path, at: edit(path, lambda tensors: {k: v for k, v in tensors.items() if "lora_" in k}),
        _saves_modules,
    ),
    "LORA429": Damage(_twice),
    "LORA431": Damage(_other_rank, lambda config: not config.rank_pattern),
    "LORA432": Damage(_to_one_factor(lambda tensor, at: tensor.new_empty(0))),
    "LORA435": Damage(_to_one_factor(lambda tensor, at: tensor.to(torch.int8))),
    "LORA441": Damage(_to_one_factor(_nan)),
    "LORA442": Damage(_without_update),
    "LORA452": Damage(lambda path, at: configure(path, base_model_name_or_path=None)),
}
"""The damage that a rule must name, the simplest first."""
