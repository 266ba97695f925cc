"""Reads the code that stands in the words of a fix: assignments and calls, as alternatives of steps.

``"set bias='none', or call model.eval() and model.train()"`` has two alternatives, the second of two steps. So has a
table of two lines. What has no code in it is prose, and no step.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

_NAME = re.compile(r"(?<![\w.'\"/\\-])[A-Za-z_]\w*")
_DOTTED = re.compile(r"\.[A-Za-z_]\w*")
_LITERAL = re.compile(r"-?\d[\d_]*(?:\.\d+)?(?:e[-+]?\d+)?|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.IGNORECASE)
_PREFIXED = re.compile(r"[rbf]?(?=['\"])")
_EITHER = re.compile(r"\b(or|else)\b", re.IGNORECASE)
NO_WAY = ("too much", "iB")
"""How a table of changes ends the line of one that does not help, or that it has told in its head."""

_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Step:
    """One piece of code in a fix, parsed, and the words that follow it up to the next.

    ``is_keyword`` says that it was written as in a call, ``r=8``, not as a statement, ``config.r = 8``.
    """

    code: str
    after: str
    is_keyword: bool

    @property
    def node(self) -> ast.stmt:
        return ast.parse(self.code).body[0]


def setting(name: str, value: object) -> Step:
    """A setting of a call as a step."""
    return Step(f"{name}={value!r}", "", is_keyword=True)


def alternatives(fix: str) -> list[list[Step]]:
    """The ways that a fix offers, each as the steps to take."""
    spans = list(_code_spans(fix))
    ways: list[list[Step]] = []
    end = 0
    for number, (start, stop, is_keyword) in enumerate(spans):
        following = spans[number + 1][0] if number + 1 < len(spans) else len(fix)
        step = Step(fix[start:stop], fix[stop:following], is_keyword)
        if not ways or _EITHER.search(fix[end:start]) or _ends_a_row(fix[end:start]):
            ways.append([])
        ways[-1].append(step)
        end = stop
    return [way for way in ways if not way[-1].after.partition("\n")[0].endswith(NO_WAY)]


def _ends_a_row(between: str) -> bool:
    """A new line starts another way, unless the one before goes on: ``a=1 with`` and, in the next line, ``b=2``."""
    return "\n" in between and between.split() != ["with"]


def _code_spans(text: str) -> Iterator[tuple[int, int, bool]]:
    position = 0
    while found := _NAME.search(text, position):
        if found[0] == "for" and (end := _loop(text, found.start())) is not None:
            yield found.start(), end, False
            position = end
            continue
        start, position = found.start(), found.end()
        end = _trailers(text, position)
        assignment = re.compile(r" ?=(?!=) ?").match(text, end)
        if assignment and (value := _value(text, assignment.end())) is not None:
            yield start, value, assignment[0] == "=" and end == found.end()
            position = value
        elif text[end - 1] == ")":
            if _parses(text[start:end]):
                yield start, end, False
            position = end


def _loop(text: str, start: int) -> int | None:
    """The end of a ``for`` statement of one line; None where the word only means what it says."""
    return next((end for end in range(len(text), start, -1) if _is_loop(text[start:end])), None)


def _is_loop(code: str) -> bool:
    try:
        return isinstance(ast.parse(code).body[0], ast.For)
    except SyntaxError:
        return False


def _trailers(text: str, end: int) -> int:
    """The end of ``.name``, ``[...]`` and ``(...)`` after a name."""
    while end < len(text):
        if dotted := _DOTTED.match(text, end):
            end = dotted.end()
        elif text[end] in "[(" and (closed := _balanced(text, end)) is not None:
            end = closed
        else:
            break
    return end


def _value(text: str, start: int) -> int | None:
    quote = _PREFIXED.match(text, start)
    if quote:
        end = _quoted(text, quote.end())
    elif text[start : start + 1] in _CLOSING:
        closed = _balanced(text, start)
        end = None if closed is None else _trailers(text, closed)
    else:
        literal = _LITERAL.match(text, start)
        end = _trailers(text, literal.end()) if literal else None
    return end if end is not None and _parses(text[start:end]) else None


def _quoted(text: str, start: int) -> int | None:
    closing = re.compile(rf"{text[start]}(?:\\.|[^\\{text[start]}])*{text[start]}").match(text, start)
    return closing.end() if closing else None


def _balanced(text: str, start: int) -> int | None:
    position = start + 1
    while position < len(text):
        if text[position] == _CLOSING[text[start]]:
            return position + 1
        if text[position] in _CLOSING:
            inner = _balanced(text, position)
        elif text[position] in "'\"":
            inner = _quoted(text, position)
        else:
            inner = position + 1
        if inner is None:
            return None
        position = inner
    return None


def _parses(code: str) -> bool:
    try:
        ast.parse(code, mode="eval")
    except SyntaxError:
        return False
    return True
