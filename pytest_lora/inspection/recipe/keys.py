"""The keys of one mapping of a recipe, read as values that know where they are from, and as OmegaConf resolves them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pytest_lora.facts.memory_choices import HALF_PRECISIONS
from pytest_lora.facts.recipe import Value
from pytest_lora.inspection.recipe.yaml_file import Node

_INTERPOLATED = re.compile(r"\$\{|\{\{|\$[A-Z_]+\b")

VISION = r".*(vision|visual|vit\b|audio|multi_modal|multimodal|aligner|merger|connector|projector).*"
"""Modules of a base that are no part of its language model, as models of several modalities call them."""

LANGUAGE = r".*language_model.*"
"""Modules of the language model of such a base."""

ALL = ".*"

_WHOLE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_STEPS = 10


class Keys:
    """A mapping of a recipe for one tool; null counts as absent.

    ``written`` has keys that the file calls otherwise than it is asked for them here.

    Args:
        root: The mapping.
        tool: The tool's name, for defaults.
    """

    def __init__(self, root: Node, tool: str) -> None:
        self.pairs = root.pairs or {}
        self.lines = root.lines
        self.tool = tool
        self.written: dict[str, str] = {}

    def node(self, *names: str) -> tuple[str, Node] | None:
        """The first of these keys that is there and not null."""
        for name in names:
            found = self.pairs.get(name)
            if found is not None and not (
                found.value is None and found.items is None and found.pairs is None
            ):
                return name, found
        return None

    def has(self, *names: str) -> bool:
        """Whether one of these keys is there and not null."""
        return self.node(*names) is not None

    def says(self, name: str) -> bool:
        """Whether a key is there and true."""
        found = self.node(name)
        return found is not None and flag(found[1]) is True

    def value(self, *names: str, read: Callable[[Node], Any], default: Any = None) -> Value:
        """The value of the first of these keys, or the tool's default."""
        found = self.node(*names)
        if found is None:
            return Value(default, "" if default is None else f"default of {self.tool}", names[0])
        name, node = found
        line = self.lines.get(name, node.line)
        name = self.written.get(name, name)
        if is_filled_in(node):
            return Value(None, f"line {line}, which is filled in elsewhere", name, line)
        return Value(read(node), f"line {line}", name, line)

    def decided(self, name: str, value: Any, *, asked: Any = None, why: str = "") -> Value:
        """What a key that is there decides, whatever its own value; ``asked`` and ``why`` as in ``Value``."""
        line = self.lines[name]
        return Value(value, f"line {line}", name, line, asked, why)

    def default(self, value: Any, key: str = "") -> Value:
        """What the tool does by itself where ``key`` does not decide it."""
        return Value(value, f"default of {self.tool}", key)

    def number(self, *names: str, default: float | None = None) -> Value:
        """A number; text that is one counts."""
        return self.value(*names, read=number, default=default)

    def count(self, *names: str, default: int | None = None) -> Value:
        """A whole number."""
        return self.value(*names, read=count, default=default)

    def flag(self, *names: str, default: bool | None = None) -> Value:
        """True or false."""
        return self.value(*names, read=flag, default=default)

    def word(self, *names: str, default: str | None = None) -> Value:
        """Text."""
        return self.value(*names, read=word, default=default)

    def names(self, *names: str, default: Any = None) -> Value:
        """A list of names as a tuple, or one name or expression as text."""
        return self.value(*names, read=names_in, default=default)

    def numbered(self) -> Iterator[tuple[str, Node, int]]:
        """Every key, its value and its line."""
        for name, node in self.pairs.items():
            yield name, node, self.lines.get(name, node.line)


def is_filled_in(node: Node) -> bool:
    """Whether something else fills the value in, such as a variable of the environment."""
    return node.plain and _INTERPOLATED.search(node.written) is not None


_OFF = ("", "false", "no", "off", "0", "0.0", "none", "auto")
"""Values, in lower case, that leave a key without effect; ``auto`` gives way to what is stated."""


def is_on(node: Node) -> bool:
    """Whether a value asks for something."""
    if node.items or node.pairs:
        return True
    return not is_filled_in(node) and node.written.strip().lower() not in _OFF


def number(node: Node) -> float | None:
    """A finite number, or None."""
    if isinstance(node.value, bool):
        return None
    try:
        found = float(node.value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def count(node: Node) -> int | None:
    """A whole number, or None."""
    found = number(node)
    return int(found) if found is not None and abs(found) < 2**63 else None


def flag(node: Node) -> bool | None:
    """True or false, also as a word or a number; None for anything else."""
    if isinstance(node.value, bool):
        return node.value
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
        str(node.value).strip().lower()
    )


def word(node: Node) -> str | None:
    """Text as written, or None for a collection."""
    return None if node.items is not None or node.pairs is not None or node.value is None else node.written


def names_in(node: Node) -> tuple[str, ...] | str | None:
    """Members of a list as text, or one text."""
    if node.items is not None:
        return tuple(one.written for one in node.items if one.written)
    return word(node)


_DTYPES = {**HALF_PRECISIONS, "fp32": "float32"}


def with_whole_dtype(found: Value) -> Value:
    """A dtype under torch's name; one that is no short name stays as it is written."""
    return replace(found, value=_DTYPES.get(found.value, found.value))


def numbers_by_name(node: Node) -> dict[str, int] | None:
    """A mapping of names to whole numbers, as ``rank_pattern`` is; None where it is none."""
    found = {name: count(value) for name, value in (node.pairs or {}).items()}
    return {name: value for name, value in found.items() if value is not None} or None


def comma_separated(value: Any) -> Any:
    """A text with commas as a tuple of names; anything else as it is."""
    if isinstance(value, str) and "," in value and not re.search(r"[()\\*|\[]", value):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def resolved(root: Node) -> Node:
    """The tree in which values that stand for others are those; what cannot be told stays as written."""
    return _copied(root, root, {})


def _copied(node: Node, root: Node, made: dict[int, Node]) -> Node:
    if id(node) in made:
        return made[id(node)]
    if node.pairs is not None:
        new = made[id(node)] = replace(node, pairs={}, lines=dict(node.lines))
        new.pairs = {name: _copied(value, root, made) for name, value in node.pairs.items()}
        return new
    if node.items is not None:
        new = made[id(node)] = replace(node, items=[])
        new.items = [_copied(value, root, made) for value in node.items]
        return new
    return _followed(node, root)


def _followed(node: Node, root: Node) -> Node:
    found = node
    for _ in range(_STEPS):
        match = _WHOLE.fullmatch(found.written) if found.value is not None else None
        if match is None:
            return replace(found, line=node.line) if found is not node else node
        place: Node | None = root
        for part in match[1].split("."):
            place = (place.pairs or {}).get(part) if place is not None else None
        if place is None or place.pairs is not None or place.items is not None:
            return node
        found = place
    return node
