"""Small errors in the code, drawn by a fixed seed: what ``benchmarks/mutants.py`` runs the tests against."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("rules", "facts", "inspection")
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One change: the module, the line, what stood there and what stands there now."""

    path: str
    line: int
    column: int
    before: str
    after: str
    tree: ast.Module
    lines: range
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}  {self.before}  ->  {self.after}"


def places(tree: ast.Module) -> Iterator[ast.AST]:
    """What can be changed: comparisons, and/or, not, arithmetic and numbers that run, no annotations or messages."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(ast.walk(node))
        for field in ("annotation", "returns", "decorator_list"):
            for part in ast.walk(ast.Module(_listed(getattr(node, field, None)), [])):
                skipped.add(part)
        if isinstance(node, (ast.JoinedStr, ast.Subscript)):
            # Formats of messages, and indices, whose wrong value raises at once.
            skipped.update(ast.walk(node) if isinstance(node, ast.JoinedStr) else ast.walk(node.slice))
    yield from (node for node in ast.walk(tree) if node not in skipped and _can_change(node))


def _can_change(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.BinOp):
        return type(node.op) in ARITHMETIC and not _is_text(node)
    return isinstance(node, ast.BoolOp) or (
        isinstance(node, ast.Constant) and type(node.value) in (int, float)
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(part, (ast.JoinedStr, ast.List, ast.Tuple))
        or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in ast.walk(node)
    )


def changed(node: Any) -> Any:
    """The node with one small error."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare):
        new.ops = [COMPARISONS[type(node.ops[0])]()]
    elif isinstance(node, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        new = new.operand
    elif isinstance(node, ast.BinOp):
        new.op = ARITHMETIC[type(node.op)]()
    else:
        new.value = node.value * 10 if node.value not in (0, 1, -1) else node.value + 1
    return new


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> Any:
        return ast.copy_location(self._new, node) if node is self._old else self.generic_visit(node)


def drawn(number: int, seed: int) -> list[Mutant]:
    """Mutants by a fixed seed, as many of each part as it has places, none twice."""
    found = []
    for part in PARTS:
        for file in sorted((ROOT / "pytest_lora" / part).rglob("*.py")):
            count = sum(1 for _ in places(ast.parse(file.read_text())))
            found += [(file, index) for index in range(count)]
    chosen = random.Random(seed).sample(found, min(number, len(found)))
    return [_mutant(file, index) for file, index in chosen]


def _mutant(file: Path, index: int) -> Mutant:
    tree = ast.parse(file.read_text())
    node: Any = list(places(tree))[index]
    lines, names = _extent(tree, node)
    new = changed(node)
    before, after = ast.unparse(node), ast.unparse(new)
    mutated = ast.fix_missing_locations(_Replace(node, new).visit(tree))
    return Mutant(
        str(file.relative_to(ROOT)), node.lineno, node.col_offset, before, after, mutated, lines, names
    )


def _extent(tree: ast.Module, node: ast.AST) -> tuple[range, tuple[str, ...]]:
    """The lines of the statement that holds a node, and the names it binds where it runs on import, and only there."""
    inside = [one for one in ast.walk(tree) if isinstance(one, ast.stmt) and node in set(ast.walk(one))]
    statement: Any = inside[-1]
    end = statement.body[0].lineno if getattr(statement, "body", None) else (statement.end_lineno or 0) + 1
    functions = [one for one in inside if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
    in_body = any(node in set(ast.walk(part)) for one in functions for part in one.body)
    if in_body:
        return range(statement.lineno, max(end, statement.lineno + 1)), ()
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    names = [one.id for one in targets if isinstance(one, ast.Name)] + [getattr(statement, "name", "")]
    return range(statement.lineno, max(end, statement.lineno + 1)), tuple(filter(None, names)) or ("",)
