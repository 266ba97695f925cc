"""Saved adapters in folders of their own: whole ones, and ones with a known damage, by the name of the rule that must
report it."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

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
from pytest_lora.inspection.peft_state import save_adapters
from pytest_lora.rules import code_of
from pytest_lora.strategies.configs import lora_configs
from pytest_lora.strategies.models import build_lora_model, require_base, require_configs, tiny_base
from pytest_lora.values import require_flag_or_none


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


_VARIANTS = ("rslora", "dora", "gaussian", "orthogonal")
"""Those that leave the base as it is: an adapter of the others is saved beside the base that it changed."""

_PLACES = st.integers(0, 2**16)


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A saved adapter. Its folder is removed when this object is not used any more.

    Attributes:
        path: The folder, as PEFT's ``save_pretrained`` writes it, and damaged then.
        code: Code of the rule by which ``check_checkpoint`` must name the damage; None for a whole adapter.
    """

    path: Path
    code: str | None


def build_adapter_folder(
    config: LoraConfig,
    base: nn.Module | None = None,
    *,
    damage: str | None = None,
    at: int = 0,
    seed: int = 0,
) -> AdapterFolder:
    """Save an adapter that has been trained, and damage it.

    Args:
        config: The adapter; it is not changed.
        base: A model without adapter. Default: the built-in one in 4 bits.
        damage: Name of the rule that must name the damage, of ``DAMAGES`` in ``pytest_lora.strategies.folders``.
        at: Where: which tensor and value, or how many bytes are lost; any number from 0 on.
        seed: Seed of the adapter's values.

    Raises:
        ValueError: The damage is unknown, or an adapter of this configuration cannot have it.
        TypeError, ValueError: PEFT refuses the configuration.
    """
    if damage is not None and (damage not in DAMAGES or not DAMAGES[damage].possible(config)):
        raise ValueError(
            f"damage: {damage!r} is none that this adapter can have: {', '.join(_damages(config))}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_lora_model(config, base, trained=True, seed=seed)
        path = Path(tempfile.mkdtemp(prefix="pytest_lora_"))
        folder = AdapterFolder(path, None if damage is None else code_of(damage))
        weakref.finalize(folder, shutil.rmtree, path, ignore_errors=True)
        save_adapters(model, str(path))
    if model.peft_config["default"].base_model_name_or_path is None:
        configure(path, base_model_name_or_path=type(model.get_base_model()).__name__)
    if damage is not None:
        DAMAGES[damage].do(path, at)
    return folder


def adapter_folders(
    base: nn.Module | None = None,
    *,
    configs: st.SearchStrategy[LoraConfig] | None = None,
    damaged: bool | None = None,
) -> st.SearchStrategy[AdapterFolder]:
    """Draw saved adapters, each in a folder that is removed when the drawn object is gone.

    ``check_checkpoint`` has neither error nor warning for a whole one, and names a damaged one by its ``code``.
    The damage may bring others with it. A failing example is printed as a call of ``build_adapter_folder``; it
    shrinks to a whole adapter, or to the simplest damage, and as its configuration does.

    Args:
        base: A model without adapter. Default: the built-in one in 4 bits.
        configs: The adapters. Default: ``lora_configs`` of the base, without the initialisations that change the
            base.
        damaged: Whether they are damaged. Default: either.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base carries an adapter, or has nothing that could be adapted.
    """
    require_base(base)
    require_configs(configs)
    require_flag_or_none("damaged", damaged)
    drawn = (
        lora_configs(tiny_base() if base is None else base, variants=_VARIANTS)
        if configs is None
        else configs
    )
    return _folders(drawn, {} if base is None else {"base": st.just(base)}, damaged)


@st.composite
def _folders(
    draw: Callable[[st.SearchStrategy[Any]], Any],
    configs: st.SearchStrategy[LoraConfig],
    given: dict[str, st.SearchStrategy[Any]],
    damaged: bool | None,
) -> AdapterFolder:
    harmed = draw(st.booleans()) if damaged is None else damaged
    config = draw(configs)
    if harmed:
        given = {**given, "damage": st.sampled_from(_damages(config)), "at": _PLACES}
    folder: AdapterFolder = draw(st.builds(build_adapter_folder, st.just(config), **given))
    return folder


def _damages(config: LoraConfig) -> list[str]:
    return [name for name, damage in DAMAGES.items() if damage.possible(config)]
