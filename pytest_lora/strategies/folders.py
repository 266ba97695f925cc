"""Saved adapters in folders of their own: whole ones, and ones with a known damage."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from pytest_lora.bases.examples.folders import configure
from pytest_lora.inspection.peft_state import save_adapters
from pytest_lora.rules import code_of
from pytest_lora.strategies.configs import lora_configs
from pytest_lora.strategies.damage import DAMAGES
from pytest_lora.strategies.models import build_lora_model, require_base, require_configs, tiny_base

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
        damage: Name of the rule that must name the damage, of ``DAMAGES`` in ``pytest_lora.strategies.damage``.
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
    if damaged is not None and not isinstance(damaged, bool):
        raise TypeError(f"damaged must be True, False or None, not {damaged!r}")
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
