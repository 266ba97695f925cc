"""What a user has in a script, to see that a fix takes none of it away."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from torch import nn

from pytest_lora import Finding
from pytest_lora.findings import starred
from pytest_lora.inspection.config import config_facts

_EXCLUDED = re.compile(r"exclude_modules=\[[^]]*\]|without `\w+`")


_IS_SAVED = re.compile(r"\.lora_|\.modules_to_save\.|\.trainable_tokens_")
"""In names of parameters that belong to an adapter."""


def possessions(names: dict[str, Any]) -> set[str]:
    """Each adapter, full copy and trained row of the script, by kind and module; of a recipe, its keys."""
    config, base, model = (dict.get(names, name) for name in ("config", "base", "model"))
    recipe = dict.get(names, "recipe")
    if isinstance(recipe, Path):
        return _of_recipe(recipe)
    if isinstance(model, nn.Module):
        return _of_model(model)
    if isinstance(config, LoraConfig) and base is not None:
        return _of_config(config, base)
    return set()


def lost(before: set[str], after: set[str], findings: list[Finding]) -> set[str]:
    """What is gone and is neither what the findings are about nor what their fix excludes by name."""
    told = " ".join(f"{f.where} {f.observed} {''.join(_EXCLUDED.findall(f.fix))}" for f in findings)
    gone = before - after
    return {one for one in gone if not _is_told(one.partition(" ")[2], told)}


def _is_told(module: str, told: str) -> bool:
    leaf = module.rpartition(".")[2]
    return module in told or starred(module) in told or f"'{leaf}'" in told


def _of_recipe(recipe: Path) -> set[str]:
    try:
        written = yaml.safe_load(recipe.read_text())
    except yaml.YAMLError:
        return set()
    return {f"key {key}" for key in written}


def _of_config(config: LoraConfig, base: Any) -> set[str]:
    facts = config_facts(config, base)
    by_letter = isinstance(config.modules_to_save, str)
    return {
        *(f"adapter {layer.module}" for layer in facts.layers),
        *(f"copy {module}" for module in facts.saved_modules if not by_letter),
        *(f"rows {module}" for module in facts.token_modules),
    }


def _of_model(model: nn.Module) -> set[str]:
    """The values of every adapter, whatever their dtype; random ones that have learned nothing yet may be others."""
    own = {name: p for name, p in model.named_parameters() if _IS_SAVED.search(name) and not p.is_meta}
    return {
        f"{'start' if _is_random_start(name, own) else _digest(values)} {_module(name)}"
        for name, values in own.items()
    }


def _is_random_start(name: str, own: dict[str, nn.Parameter]) -> bool:
    """Whether this is a ``lora_A`` whose ``lora_B`` is zero, as they are made."""
    other = own.get(name.replace(".lora_A.", ".lora_B."))
    return ".lora_A." in name and other is not None and not other.any()


def _digest(values: torch.Tensor) -> str:
    values = getattr(values, "to_local", lambda: values)()  # FSDP's, of which a process has a part
    return sha256(values.detach().float().cpu().numpy().tobytes()).hexdigest()[:8]


def _module(name: str) -> str:
    return _IS_SAVED.split(name.removeprefix("base_model.model."))[0]
