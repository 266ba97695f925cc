"""Applies the lines that a fix prints to the recipe of a script, as a reader of the message would edit the file.

``"add `packing: false`, or write `attn: flash`"`` has two alternatives of one edit each. Code between the ticks that is
no line of YAML, ``gpus=4``, is an argument of the check.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

_WORDS = re.compile(
    r"`([^`]*)`|\b(write|add|remove|keep|without|or)\b|(in its place)|(spaces instead of the tab)"
)
_LINE = re.compile(r"(?P<indent>[ -]*)(?P<key>[\w./-]+)\s*:(?P<value>.*)")


@dataclass(frozen=True)
class Edit:
    """What to do with a line: the verb, and the code between the ticks."""

    verb: str
    code: str
    in_its_place: bool = False


def edits(fix: str) -> list[list[Edit]]:
    """The ways that a fix offers, each as the edits to make; prose is none."""
    ways: list[list[Edit]] = [[]]
    verb = ""
    for found in _WORDS.finditer(fix):
        code, word, place, untab = found.groups()
        if word == "or":
            ways.append([])
        elif word:
            verb = word
        elif place:
            ways[-1][-1] = Edit(verb, ways[-1][-1].code, in_its_place=True)
        else:
            ways[-1].append(Edit("untab", "") if untab else Edit(verb, code))
    return [way for way in ways if way]


def mended_recipe(source: str, way: list[Edit], line: int | None) -> str | None:
    """The script with the edited recipe; None where an edit is about nothing in it."""
    tree = ast.parse(source)
    written = _text_of_recipe(tree)
    if written is None:
        return None
    lines: list[str] | None = str(written.value).split("\n")
    for edit in way:
        if re.match(r"\w+=", edit.code):
            lines = lines if _argument(tree, edit.code) else None
        else:
            lines = _edited(lines or [], edit, line)
        if lines is None:
            return None
    written.value = "\n".join(lines or [])
    return ast.unparse(tree)


def _text_of_recipe(tree: ast.Module) -> ast.Constant | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "recipe.write_text":
            (text,) = node.args
            return text if isinstance(text, ast.Constant) else None
    return None


def _argument(tree: ast.Module, code: str) -> bool:
    name, value = code.split("=", 1)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "check_recipe":
            node.keywords = [k for k in node.keywords if k.arg != name]
            node.keywords.append(ast.keyword(name, ast.parse(value, mode="eval").body))
            return True
    return False


def _edited(lines: list[str], edit: Edit, line: int | None) -> list[str] | None:
    if edit.verb == "untab":
        return [text.replace("\t", "  ") for text in lines]
    key = edit.code.partition(":")[0]
    places = [i for i, text in enumerate(lines) if (m := _LINE.fullmatch(text)) and m["key"] == key]
    if edit.verb == "add":
        return [*lines, edit.code] if not places else None
    if edit.verb in ("remove", "without"):
        same = [i for i in places if ":" not in edit.code or lines[i].strip() == edit.code]
        return _without(lines, same[0]) if same else None
    if edit.verb == "keep":
        gone = [i for i in places if lines[i].strip() != edit.code]
        return _without(lines, gone[0]) if gone else None
    if edit.verb != "write":
        return None
    if edit.in_its_place:
        places = [line - 1] if line else []
    if not places:
        return [*lines, edit.code]
    indent = re.match(r"[ -]*", lines[places[-1]])
    new = f"{indent[0] if indent else ''}{edit.code}"
    rest = _without(lines, places[-1])
    return [*rest[: places[-1]], new, *rest[places[-1] :]]


def _without(lines: list[str], place: int) -> list[str]:
    """The lines without one, and without what is nested in it."""
    depth = _depth(lines[place])
    end = place + 1
    while end < len(lines) and lines[end].strip() and _depth(lines[end]) > depth:
        end += 1
    return [*lines[:place], *lines[end:]]


def _depth(text: str) -> int:
    """How far a line is indented; an item of a list belongs to the key above it, however it is indented."""
    return len(text) - len(text.lstrip()) + text.lstrip().startswith("- ")
