"""YAML with the line of every key, read safely: bounded in size, depth and aliases, and only plain values are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from pytest_lora.facts.recipe_lines import Flaw, Repeated

MAX_BYTES = 256 * 2**10
"""A recipe has a few kilobytes."""
MAX_DEPTH = 32
MAX_NODES = 20_000
MAX_ALIASES = 200

_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = "tag:yaml.org,2002:"
_KINDS = ("str", "int", "float", "bool", "null")
# libyaml parses ten times as fast; wheels of PyYAML bring it, builds from source may not.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class BrokenError(Exception):
    """The file is no YAML; ``flaw`` says where."""

    def __init__(self, flaw: Flaw) -> None:
        super().__init__(flaw.message)
        self.flaw = flaw


@dataclass
class Node:
    """A value of the file.

    Attributes:
        line: Its line, from 1.
        value: A scalar, or None for collections.
        written: A scalar as written.
        plain: Whether it is a scalar without quotes.
        items: Members of a sequence.
        pairs: Members of a mapping, the last of repeated keys, merged ones first.
        lines: The line of each key.
    """

    line: int
    value: Any = None
    written: str = ""
    plain: bool = False
    items: list[Node] | None = None
    pairs: dict[str, Node] | None = None
    lines: dict[str, int] = field(default_factory=dict)

    def unwrapped(self) -> Any:
        """The value as Python has it, collections within collections."""
        if self.items is not None:
            return [one.unwrapped() for one in self.items]
        if self.pairs is not None:
            return {key: one.unwrapped() for key, one in self.pairs.items()}
        return self.value


@dataclass
class YamlFile:
    """A file that is YAML: its root, its lines, and the keys that stand twice."""

    root: Node
    lines: list[str]
    repeated: list[Repeated]


def read_yaml(data: bytes) -> YamlFile:
    """Read one document.

    Raises:
        BrokenError: It is no YAML, is too large, or asks for more than plain values.
    """
    if len(data) > MAX_BYTES:
        raise BrokenError(Flaw("limit", 1, f"the file has {len(data)} bytes, more than {MAX_BYTES}"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BrokenError(Flaw("syntax", line, f"byte {error.start} is not UTF-8")) from error
    return _Composer(text).read()


class _Composer:
    """Builds nodes from the parser's events, with a stack of its own: nothing recurs, so depth costs nothing."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines()
        self.repeated: list[Repeated] = []
        self.nodes = self.aliases = 0

    def read(self) -> YamlFile:
        try:
            root = self._compose(yaml.parse(self.text, Loader=_LOADER))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise BrokenError(self._flaw(error)) from error
        return YamlFile(root or Node(1), self.lines, self.repeated)

    def _flaw(self, error: Exception) -> Flaw:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = str(getattr(error, "problem", None) or error).splitlines()[0][:200]
        around = range(max(0, line - 2), min(line + 1, len(self.lines)))
        tabbed = next((n for n in around if "\t" in _indent(self.lines[n])), None)
        if tabbed is None and "\\t" in problem:
            tabbed = line - 1
        if tabbed is not None:
            return Flaw("tab", tabbed + 1, problem)
        return Flaw("tag" if isinstance(error, ConstructorError) else "syntax", line, problem)

    def _compose(self, events: Iterator[Any]) -> Node | None:
        anchors: dict[str, Node] = {}
        stack: list[_Open] = []
        root: Node | None = None
        documents = 0
        for event in events:
            kind = type(event).__name__
            if kind == "DocumentStartEvent":
                documents += 1
                if documents > 1:
                    break  # a tool loads the first document, or none of several
                continue
            if kind in ("MappingEndEvent", "SequenceEndEvent"):
                node = stack.pop().node
            elif kind == "AliasEvent":
                node = self._alias(event, anchors, stack)
            elif kind in ("ScalarEvent", "MappingStartEvent", "SequenceStartEvent"):
                self._count(event, len(stack))
                node = self._node(event, kind)
                if event.anchor:
                    anchors[event.anchor] = node
                if kind != "ScalarEvent":
                    stack.append(_Open(node))
                    continue
            else:
                continue
            if stack:
                self._add(stack[-1], node, event.start_mark.line + 1)
            else:
                root = node
        return root

    def _count(self, event: Any, depth: int) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise BrokenError(
                Flaw("limit", event.start_mark.line + 1, f"nested deeper than {MAX_DEPTH} levels")
            )
        if self.nodes > MAX_NODES:
            raise BrokenError(Flaw("limit", event.start_mark.line + 1, f"more than {MAX_NODES} values"))

    def _alias(self, event: Any, anchors: dict[str, Node], stack: list[_Open]) -> Node:
        line = event.start_mark.line + 1
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise BrokenError(Flaw("limit", line, f"more than {MAX_ALIASES} aliases"))
        if event.anchor not in anchors:
            raise BrokenError(Flaw("syntax", line, f"the alias *{event.anchor} has no anchor"))
        node = anchors[event.anchor]
        if any(one.node is node for one in stack):
            raise BrokenError(Flaw("limit", line, f"the alias *{event.anchor} stands within what it means"))
        self.nodes += _size(node, MAX_NODES)
        if self.nodes > MAX_NODES:
            raise BrokenError(Flaw("limit", line, f"aliases that stand for more than {MAX_NODES} values"))
        return node

    def _node(self, event: Any, kind: str) -> Node:
        line = event.start_mark.line + 1
        if str(event.tag).startswith(f"{_PLAIN}python"):
            raise BrokenError(Flaw("tag", line, f"the tag {event.tag} asks for a Python object"))
        if kind == "MappingStartEvent":
            return Node(line, pairs={})
        if kind == "SequenceStartEvent":
            return Node(line, items=[])
        plain = bool(event.implicit[0])
        tag = event.tag if event.tag not in (None, "!") else _tag(event.value, plain)
        return Node(line, _scalar(tag, event), event.value, plain)

    def _add(self, parent: _Open, node: Node, line: int) -> None:
        if parent.node.items is not None:
            parent.node.items.append(node)
            return
        if parent.key is None:
            parent.key = node, line
            return
        (key, key_line), parent.key = parent.key, None
        pairs = parent.node.pairs
        assert pairs is not None
        if key.plain and key.written == "<<":
            self._merge(parent, node)
            return
        name = str(key.written or key.unwrapped())
        if name in pairs and name not in parent.merged:
            first = parent.node.lines[name]
            self.repeated.append(Repeated(name, first, key_line, self._line(first), self._line(key_line)))
        parent.merged.discard(name)
        pairs[name] = node
        parent.node.lines[name] = key_line

    def _merge(self, parent: _Open, node: Node) -> None:
        pairs = parent.node.pairs
        assert pairs is not None
        for one in node.items if node.items is not None else [node]:
            for name, value in (one.pairs or {}).items():
                if name not in pairs:
                    pairs[name] = value
                    parent.node.lines[name] = one.lines.get(name, value.line)
                    parent.merged.add(name)

    def _line(self, number: int) -> str:
        return self.lines[number - 1].strip() if 0 < number <= len(self.lines) else ""


@dataclass
class _Open:
    """A collection that is being read."""

    node: Node
    key: tuple[Node, int] | None = None
    merged: set[str] = field(default_factory=set)


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _size(node: Node, limit: int) -> int:
    """Values that a node stands for, counted up to a limit."""
    waiting, count = [node], 0
    while waiting and count <= limit:
        one = waiting.pop()
        count += 1
        waiting.extend(one.items or ())
        waiting.extend((one.pairs or {}).values())
    return count


def _tag(text: str, plain: bool) -> str:
    if plain:
        first = text[0] if text else ""
        for tag, expression in yaml.SafeLoader.yaml_implicit_resolvers.get(first, ()):
            if expression.match(text):
                return str(tag)
    return f"{_PLAIN}str"


def _scalar(tag: str, event: Any) -> Any:
    kind = tag.removeprefix(_PLAIN)
    if kind not in _KINDS or kind == "str":
        return event.value
    node = yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark)
    constructor: Any = SafeConstructor()
    try:
        return getattr(constructor, f"construct_yaml_{kind}")(node)
    except (ValueError, KeyError, IndexError, OverflowError):
        return event.value
