"""Interpolations of OmegaConf: ``${training.learning_rate}`` stands for the value of that key."""

from __future__ import annotations

import re
from dataclasses import replace

from pytest_lora.inspection.recipe.yaml_file import Node

_WHOLE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_STEPS = 10


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
