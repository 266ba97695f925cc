"""Findings of rules that know no recipe, in the notation of the recipe that they fire on: its lines and its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from pytest_lora.changes import Change, assigned
from pytest_lora.facts.recipe import GIVEN, RecipeFacts, RunSetting, Value
from pytest_lora.findings import Finding
from pytest_lora.inspection.recipe.home_made import NAME as OF_ONES_OWN

_BESIDE = {
    "alpha_pattern": ("lora_alpha", "r"),
    "exclude_modules": ("target_modules",),
    "layers_to_transform": ("target_modules",),
    "lora_alpha": ("r",),
    "modules_to_save": ("new_tokens", "target_modules"),
    "rank_pattern": ("r",),
    "target_parameters": ("target_modules",),
    "task_type": ("target_modules",),
}
"""Settings that a reader looks at where the recipe does not have the one that a fix changes."""

_MORE_KEYS = {
    "Axolotl": {
        "ensure_weight_tying": "peft_ensure_weight_tying",
        "init_lora_weights": "peft_init_lora_weights",
        "trainable_token_indices": "peft_trainable_token_indices",
    },
    "ms-swift": {"init_lora_weights": "init_weights"},
}
"""Keys of fields of ``LoraConfig`` that the setting of a run does not hold, as in ``known_keys.json``."""

_IN_4_BITS = {
    "Axolotl": ("adapter: qlora", "load_in_4bit: true"),
    "LLaMA-Factory": ("quantization_bit: 4",),
    "ms-swift": ("quant_method: bnb", "quant_bits: 4"),
}
"""What quantizes the base to nf4, of which it is the kind by default; elsewhere ``load_in_4bit: true``."""

_BY_COMMAS = "LLaMA-Factory"
"""The tool whose lists are words with commas between them, and whose word for all linear modules is ``all``."""

_MOST_LISTED = 40
"""Rows of an embedding that are spelled out; more are said as a range of Python."""


def placed(finding: Finding, facts: RecipeFacts, setting: RunSetting) -> Finding:
    """A finding on the configuration at the line of the recipe that it comes from."""
    field, value = _decided(finding.changes, setting)
    place = f"{facts.name}:{value.line}" if value.line else facts.name
    fix = in_its_notation(finding.fix, finding.changes, setting)
    if fix == finding.fix and value.key and value.key != field:
        fix += f"; in this recipe {field} is `{value.key}`"
    return replace(
        finding,
        where=f"{place}: {value.key or field} ({finding.where})",
        fix=fix,
        line=value.line,
        changes=said_there(finding.changes, setting),
    )


def _decided(changes: tuple[Change, ...], setting: RunSetting) -> tuple[str, Value]:
    """The first setting of the recipe that a fix changes, or one beside it; the targets where it changes none."""
    changed = [name for change in changes for name in change.settings if hasattr(setting, name)]
    changed = changed or ["target_modules"]
    for name in (found for one in changed for found in (one, *_BESIDE.get(one, ()))):
        value: Value = getattr(setting, name)
        if value.stated:
            return name, value
    return changed[0], getattr(setting, changed[0])


def in_its_notation(fix: str, changes: tuple[Change, ...], setting: RunSetting) -> str:
    """A fix with each of its changes as the lines of the recipe that say it.

    ``"set lora_alpha=4"`` becomes ``"write `lora_alpha: 4`"``. What the tool has no key for stays, which is said. A
    script's arguments are Python already.
    """
    if setting.base.source == GIVEN:
        return fix
    told, rest = "", fix
    for change in changes:
        before, said, after = rest.partition(change.said)
        if said:
            told, rest = f"{told}{before}{_in_lines(change, setting)}", after
    return told + rest


def said_there(changes: tuple[Change, ...], setting: RunSetting) -> tuple[Change, ...]:
    """The same changes, as a fix in the notation of the recipe says them."""
    return tuple(replace(one, said=in_its_notation(one.said, (one,), setting)) for one in changes)


def _in_lines(change: Change, setting: RunSetting) -> str:
    """``"write `lora_r: 8` and `lora_alpha: 16`"``: what to do to the recipe."""
    if any(_is_long(value) for value in change.settings.values()):
        return change.said
    told, last = "", "write" if change.is_noun else ""
    for name, value in change.settings.items():
        verb, line = _line(name, value, setting)
        if told:
            told += " and " if last else ", "
        told += line if verb in ("", last) else f"{verb} {line}"
        last = verb
    return told


def _is_long(value: Any) -> bool:
    """Whether it holds more rows than are spelled out."""
    if isinstance(value, Mapping):
        return any(_is_long(one) for one in value.values())
    return isinstance(value, list) and len(value) > _MOST_LISTED and isinstance(value[0], int)


def _line(name: str, value: Any, setting: RunSetting) -> tuple[str, str]:
    """What to do to the recipe, so that a field of ``LoraConfig`` or of a step has this value: a verb, and the line; no
    verb where the tool has no key for it."""
    tool = setting.tool
    if name == "quantization" and value in ("nf4", "fp4"):
        return "write", " and ".join(f"`{line}`" for line in _IN_4_BITS.get(tool, ("load_in_4bit: true",)))
    held: Value | None = getattr(setting, name, None)
    key = (held.key if held is not None else "") or _MORE_KEYS.get(tool, {}).get(name, "")
    if not key and tool == OF_ONES_OWN:
        key = name
    if not key:
        return "", f"{assigned(**{name: value})} (for which {tool} has no key)"
    if value is None:
        return "remove", f"`{key}`"
    if name == "target_modules":
        return _targets(key, value, tool)
    return "write", f"`{key}: {_yaml(_of_tool(value, tool))}`"


def _targets(key: str, value: Any, tool: str) -> tuple[str, str]:
    """The line with the targets, for which tools have several keys and words."""
    whole = value == "all-linear"
    if tool == "Axolotl":
        own, other = "lora_target_modules", "lora_target_linear"
        own, other, value = (other, own, True) if whole else (own, other, value)
    elif tool == "ms-swift":
        own, other = "target_modules", "target_regex"
        own, other = (other, own) if isinstance(value, str) and not whole else (own, other)
    else:
        own = other = key
        if tool == "TRL" and isinstance(value, list) and len(value) == 1:
            value = (
                rf".*\b{re.escape(value[0])}"  # a list of one reaches PEFT as an expression for whole names
            )
        if tool == _BY_COMMAS and isinstance(value, str) and not whole:
            return "", f"target_modules={value!r} ({tool} takes names and no patterns)"
    line = f"`{own}: {_yaml('all' if whole and tool == _BY_COMMAS else _of_tool(value, tool))}`"
    return "write", f"{line} in place of `{key}`" if key == other != own else line


def _of_tool(value: Any, tool: str) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {name: _of_tool(found, tool) for name, found in value.items()}
    return ",".join(map(str, value)) if tool == _BY_COMMAS and isinstance(value, list) else value


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


def smaller_step(fix: str, changes: tuple[Change, ...], setting: RunSetting) -> str:
    """Advice on the memory of a step in the notation of the recipe."""
    fix = in_its_notation(fix, changes, setting)
    for name in ("batch_size", "seq_len"):
        if key := getattr(setting, name).key:
            fix = re.sub(rf"\b{name}\b(?!=)", f"`{key}`", fix)
    return fix
