"""A recipe as facts: which tool it is for, what nothing in it is read by, and the setting of the run it describes.

The file and those beside it that it names are read and never executed; nothing outside its folder is read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

from pytest_lora.facts.recipe import BaseModel, RecipeFacts, RunSetting, SavedAdapter
from pytest_lora.facts.recipe_lines import Flaw
from pytest_lora.files import start_of
from pytest_lora.inspection.recipe import axolotl, home_made, llamafactory, ms_swift, trl
from pytest_lora.inspection.recipe.beside import Tree
from pytest_lora.inspection.recipe.clashes import clashes
from pytest_lora.inspection.recipe.interpolation import resolved
from pytest_lora.inspection.recipe.keys import Keys
from pytest_lora.inspection.recipe.unread import no_choices, unknown_keys, wrong_kinds
from pytest_lora.inspection.recipe.yaml_file import MAX_BYTES, BrokenError, YamlFile, read_yaml

TOOLS = (axolotl, llamafactory, ms_swift, trl)
"""In the order in which they are asked; each knows its recipes by keys that no other has."""

SUFFIXES = (".yaml", ".yml", ".json")

MOST_UNKNOWN = 60
"""Keys that nothing reads which are looked up among those that there are, at some milliseconds each: more than a rule
tells of."""

_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
"""Fields in which two bases agree that can carry one adapter."""

_LIKELY = re.compile(
    rb"\b(lora_r|lora_rank|lora_alpha|finetuning_type|use_peft|tuner_type|adapter:\s*q?lora)\b"
)


def recipe_facts(path: Path, base: str | None = None) -> RecipeFacts:
    """Read a recipe; what is no YAML is a flaw, and what is no LoRA training is left alone.

    Args:
        path: The file.
        base: Name or path of the base, where the recipe's own is not to be taken.
    """
    try:
        file = read_yaml(start_of(path, MAX_BYTES))
    except OSError as error:
        return RecipeFacts(path.name, flaw=Flaw("unreadable", 1, str(error.strerror or error)))
    except BrokenError as error:
        return RecipeFacts(path.name, flaw=error.flaw)
    if file.root.pairs is None:
        return RecipeFacts(path.name, left_alone="it is no mapping of keys")
    found = recognised(file)
    if found is None:
        return RecipeFacts(path.name, left_alone="it is no recipe of a tool that is known")
    tool, keys = found
    reason = tool.left_alone(keys)
    if reason:
        return RecipeFacts(path.name, tool=tool.NAME, left_alone=reason)
    return _facts(path, file, tool, keys, base)


def recognised(file: YamlFile) -> tuple[ModuleType, Keys] | None:
    """The tool that a file is a recipe of, and its keys as that tool sees them."""
    plain = Keys(file.root, "")
    for tool in TOOLS:
        if tool.is_mine(plain):
            root = resolved(file.root) if tool is llamafactory else file.root
            return tool, Keys(root, tool.NAME)
    flat = home_made.flattened(resolved(file.root))
    return (home_made, flat) if home_made.is_mine(flat) else None


def is_likely(path: Path) -> bool:
    """Whether a file that may be no YAML speaks of LoRA in the words of a recipe."""
    try:
        return _LIKELY.search(start_of(path, MAX_BYTES)) is not None
    except OSError:
        return False


def _facts(path: Path, file: YamlFile, tool: ModuleType, keys: Keys, base: str | None) -> RecipeFacts:
    tree = Tree(path.parent)
    setting: RunSetting = tool.setting(keys, tree)
    named = base or setting.base.value
    continued = setting.continues.value
    return RecipeFacts(
        name=path.name,
        tool=tool.NAME,
        repeated=tuple(file.repeated),
        unknown=tuple(islice(unknown_keys(keys, tool, file), MOST_UNKNOWN)),
        wrong=(*wrong_kinds(file, tool), *no_choices(keys, tool)),
        clashes=tuple(clashes(keys, tool)),
        setting=setting,
        base=None if named is None else base_model(str(named)),
        base_is_adapter=tree.adapter(setting.base.value),
        continued=_continued(tree, continued, named),
        listed=_listed(keys, tool),
        conversational=_conversations(keys, tree, tool),
    )


def _continued(tree: Tree, folder: object, base: object) -> SavedAdapter | None:
    """The adapter folder that training goes on from, compared with the base as far as the shapes of both are known."""
    from pytest_lora.inspection.public_bases import find_shape

    found = tree.adapter(folder)
    if found is None or not isinstance(found.base, str) or not isinstance(base, str):
        return found
    own, other = find_shape(base), find_shape(found.base)
    if own is None or other is None:
        return found
    return replace(found, same_shape=all(own.text(field) == other.text(field) for field in _SIZES))


def base_model(name: str) -> BaseModel | None:
    """What the data of public models says of a base; None where it is not among them."""
    from pytest_lora.inspection.public_bases import find_shape

    shape = find_shape(name)
    if shape is None:
        return None
    length = shape.text("max_position_embeddings")
    return BaseModel(
        shape.name, shape.config.get("dtype"), shape.parameters, length if isinstance(length, int) else None
    )


def _listed(keys: Keys, tool: ModuleType) -> tuple[str, ...]:
    """Modules that a recipe of Axolotl lists beside ``lora_target_linear``, which are united with all linear ones."""
    if tool is not axolotl or not keys.says("lora_target_linear"):
        return ()
    names = keys.names("lora_target_modules").value
    return names if isinstance(names, tuple) else ()


def _conversations(keys: Keys, tree: Tree, tool: ModuleType) -> str | None:
    """The first data file beside a recipe of TRL that holds conversations."""
    if tool is not trl:
        return None
    names = [keys.word("dataset_name").value]
    found = keys.node("datasets")
    for one in (found[1].items or ()) if found else ():
        data = (one.pairs or {}).get("data_files") or (one.pairs or {}).get("path")
        names.extend(
            [data.written]
            if data is not None and data.items is None
            else [i.written for i in data.items or ()]
            if data
            else []
        )
    return next((name for name in names if name and tree.holds_conversations(name)), None)
