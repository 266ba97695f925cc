"""Findings of rules that know no recipe, in the notation of the recipe that they fire on: its lines and its keys."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import yaml

from pytest_lora.facts.recipe import GIVEN, RecipeFacts, RunSetting, Value
from pytest_lora.findings import Finding

_FIELDS: tuple[tuple[str, str], ...] = (
    ("layers_to_transform", "layers_to_transform"),
    ("rank_pattern", "rank_pattern"),
    ("alpha_pattern", "alpha_pattern"),
    ("task_type", "task_type"),
    ("target_modules", "target_modules"),
    ("target_parameters", "target_parameters"),
    ("modules_to_save", "modules_to_save"),
    ("exclude_modules", "exclude_modules"),
    ("new_tokens", "new_tokens"),
    ("rank_exceeds", "r"),
    ("lora_alpha", "lora_alpha"),
    ("alpha", "lora_alpha"),
    ("scaling", "lora_alpha"),
    ("rank", "r"),
    ("dropout", "lora_dropout"),
    ("bias", "bias"),
)

_WHERE_STATED = ("layers_to_transform", "rank_pattern", "alpha_pattern", "task_type")
"""Fields that advice on others names too."""

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

_ASSIGNED = re.compile(
    r"(?:\b(?:set|use|write) )?\b(?P<name>r|lora_\w+|target_\w+|modules_to_save|exclude_modules|layers_to_transform|"
    r"use_\w+|bias|task_type|(?:rank|alpha)_pattern|init_lora_weights|trainable_token_indices|ensure_weight_tying|"
    r"batch_size|seq_len|gradient_checkpointing|quantization)=(?=[\[{('\"\w.-])"
)
_RANGE = re.compile(r"list\(range\((\d+), (\d+)\)\)")
_MOST_LISTED = 40
"""Numbers of a range that are spelled out."""


def placed(finding: Finding, facts: RecipeFacts, setting: RunSetting) -> Finding:
    """A finding on the configuration at the line of the recipe that it comes from."""
    text = f"{finding.rule} {finding.where} {finding.fix}"
    field = next(
        (
            name
            for word, name in _FIELDS
            if re.search(rf"\b{word}|{word}\b", text)
            and (name not in _WHERE_STATED or getattr(setting, name).stated)
        ),
        "target_modules",
    )
    value: Value = getattr(setting, field)
    if not value.stated and field == "lora_alpha":
        value = replace(value, line=setting.r.line)
    if not value.stated and setting.modules_to_save.stated and "save" in finding.rule:
        value = setting.modules_to_save
    if not value.stated and field == "target_parameters":
        value = setting.target_modules  # advice to add parameters to the targets
    if not value.stated and setting.exclude_modules.stated and "exclude_modules" in finding.fix:
        value = setting.exclude_modules
    if not value.stated and finding.rule == "new_tokens_are_not_trained":
        value = setting.new_tokens  # the line that asks for what is left out
    place = f"{facts.name}:{value.line}" if value.line else facts.name
    observed = finding.observed
    if "ParamWrapper" in observed:
        observed += ": the experts of this base are fused parameters and no modules, which names of them mean"
    fix = in_its_notation(finding.fix, setting)
    if fix == finding.fix and value.key and value.key != field:
        fix += f"; in this recipe {field} is `{value.key}`"
    return replace(
        finding,
        observed=observed,
        where=f"{place}: {value.key or field} ({finding.where})",
        fix=fix,
        line=value.line,
    )


def in_its_notation(fix: str, setting: RunSetting) -> str:
    """Advice with each assignment of Python as the line of the recipe that says it.

    ``"set lora_alpha=4"`` becomes ``"write `lora_alpha: 4`"``. What is no literal stays, and so does what the tool has
    no key for, which is said. A script's arguments are Python already.
    """
    if setting.base.source == GIVEN:
        return fix
    fix = _RANGE.sub(_spelled_out, fix)
    parts: list[str] = []
    at = 0
    for found in _ASSIGNED.finditer(fix):
        if found.start() < at:
            continue
        end = _end_of_literal(fix, found.end())
        try:
            value = ast.literal_eval(fix[found.end() : end])
        except (ValueError, SyntaxError):
            continue
        lines = _lines(found["name"], value, setting)
        before = fix[at : found.start()]
        joined = before == ", " and bool(parts) and parts[-1].endswith("`")
        bare = joined or before.endswith(("such as ", "with "))
        parts += [" and " if joined else before, lines.removeprefix("write ") if bare else lines]
        at = end
    return "".join((*parts, fix[at:]))


def _spelled_out(found: re.Match[str]) -> str:
    first, end = int(found[1]), int(found[2])
    return str(list(range(first, end))) if end - first <= _MOST_LISTED else found[0]


def _end_of_literal(text: str, start: int) -> int:
    """Where a literal of Python ends: after its last bracket or quote, else after the last character of its word."""
    depth, at, quote = 0, start, ""
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "[({":
            depth += 1
        elif char in "])}":
            depth -= 1
        at += 1
        if not quote and not depth and (char in "'\"])}" or not re.match(r"[\w+-]|\.\d", text[at : at + 2])):
            break
    return at


def _lines(name: str, value: Any, setting: RunSetting) -> str:
    """What to do to the recipe, so that a field of ``LoraConfig`` or of a step has this value."""
    tool = setting.tool
    if name == "quantization" and value in ("nf4", "fp4"):
        return "write " + " and ".join(f"`{line}`" for line in _IN_4_BITS.get(tool, ("load_in_4bit: true",)))
    held: Value | None = getattr(setting, name, None)
    key = (held.key if held is not None else "") or _MORE_KEYS.get(tool, {}).get(name, "")
    if not key and tool.startswith("a recipe of"):
        key = name
    if not key:
        return f"{name}={value!r} (for which {tool} has no key)"
    if value is None:
        return f"remove `{key}`"
    if name == "target_modules":
        return _targets(key, value, tool)
    return f"write `{key}: {_yaml(_of_tool(value, tool))}`"


def _targets(key: str, value: Any, tool: str) -> str:
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
            return f"target_modules={value!r} ({tool} takes names and no patterns)"
    line = f"`{own}: {_yaml('all' if whole and tool == _BY_COMMAS else _of_tool(value, tool))}`"
    return f"write {line} in place of `{key}`" if key == other != own else f"write {line}"


def _of_tool(value: Any, tool: str) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return ",".join(map(str, value)) if tool == _BY_COMMAS and isinstance(value, list) else value


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


def smaller_step(fix: str, setting: RunSetting) -> str:
    """Advice on the memory of a step in the notation of the recipe."""
    fix = fix.replace(", unless advise=False,", "")
    for name in ("batch_size", "seq_len"):
        key = getattr(setting, name).key
        if key:
            fix = re.sub(rf"\b{name}\b(?!=)", f"`{key}`", fix)
    return " or ".join(_without_verb(in_its_notation(fix, setting)))


def _without_verb(fix: str) -> Iterator[str]:
    """Parts of ``"take a shorter `a` or write `b: true`"`` with the verb of the first alone."""
    first, *others = fix.split(" or write `")
    yield first.replace(", write `", ", `")
    yield from (f"`{other}" for other in others)
