"""How many small errors in the code the tests notice.

``python benchmarks/mutants.py [--number 200] [--seed 0] [--jobs 2] [--json PATH]`` draws mutants by a fixed seed from
the rules, the facts, the inspection and the keeper, changes one operator or one number in each, runs the nearest tests
until one fails, and prints the share that was killed and every one that survived. The libraries are imported once; each
mutant is a forked process in which the one module is compiled from changed source, so that no file is written.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.abc
import importlib.util
import io
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("rules", "facts", "inspection")
LIMIT = 240
"""Seconds that the tests of one mutant may take; one that runs out is killed, as a loop without end would be."""

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
NEAREST = (
    ("facts/figures", ("tests/report",)),
    ("facts/checkpoint", ("tests/rules/test_checkpoint_rules.py", "tests/checkpoint")),
    ("facts/saved_", ("tests/rules/test_checkpoint_rules.py", "tests/checkpoint")),
    ("facts/resumption", ("tests/checkpoint/test_resumable.py",)),
    ("facts/behaviour", ("tests/behaviour",)),
    ("facts/properties", ("tests/test_shape_assertions.py", "tests/test_update_ranks.py")),
    ("facts/sweep", ("tests/sweep/test_gate.py", "tests/sweep/test_choice.py")),
    ("facts/memory", ("tests/rules/test_memory_rules.py", "tests/memory")),
    ("facts/byte_sizes", ("tests/memory/test_byte_sizes.py", "tests/memory/test_frontier.py")),
    ("facts/number_tables", ("tests/test_counting.py", "tests/memory/test_frontier.py")),
    ("facts/history", ("tests/rules/test_history_rules.py",)),
    ("facts/curve", ("tests/rules/test_history_rules.py",)),
    ("facts/measures", ("tests/plugin/test_baseline_gate.py", "tests/report")),
    ("facts/recipe", ("tests/recipe", "tests/rules/test_recipe_rules.py")),
    ("facts/", ("tests/rules", "tests/test_training.py", "tests/test_training_trace.py")),
    ("inspection/state", ("tests/state",)),
    ("inspection/behaviour", ("tests/behaviour", "tests/strategies/test_lifecycle.py")),
    ("inspection/checkpoint", ("tests/checkpoint", "tests/rules/test_checkpoint_rules.py")),
    ("inspection/memory", ("tests/memory",)),
    ("inspection/recipe", ("tests/recipe",)),
    ("inspection/resumption", ("tests/checkpoint/test_resumable.py",)),
    ("inspection/properties", ("tests/test_shape_assertions.py",)),
    ("inspection/ranks", ("tests/runs/test_distributed.py",)),
    (
        "inspection/training",
        ("tests/test_training.py", "tests/test_training_trace.py", "tests/test_update_ranks.py", "tests"),
    ),
    (
        "inspection/",
        ("tests/rules", "tests/test_counting.py", "tests/test_random_configs.py", "tests/test_training.py"),
    ),
)
"""Tests of a part of the package, the nearest first; those that mention a rule's code come before."""


@dataclass(frozen=True)
class Mutant:
    """One change: the module, the line, what stood there and what stands there now."""

    path: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {self.before}  ->  {self.after}"


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
    new = changed(node)
    before, after = ast.unparse(node), ast.unparse(new)
    mutated = ast.unparse(ast.fix_missing_locations(_Replace(node, new).visit(tree)))
    return Mutant(str(file.relative_to(ROOT)), node.lineno, before, after, mutated)


def nearest(mutant: Mutant) -> list[list[str]]:
    """Arguments of pytest for the tests to run one after the other."""
    inside = mutant.path.removeprefix("pytest_lora/")
    if inside.startswith("rules/"):
        text = (ROOT / mutant.path).read_text()
        code = (re.findall(r'@rule\(\s*"(\w+)"', text) or [""])[0]
        name = Path(mutant.path).stem
        users = [
            str(f.relative_to(ROOT))
            for f in sorted((ROOT / "tests").rglob("test_*.py"))
            if code and code in f.read_text()
        ]
        first = [["tests/rules/test_catalogue.py", "-k", name if code else "example"]]
        rest = sorted(users, key=lambda path: (not path.startswith("tests/rules"), path)) or ["tests/rules"]
        return first + [[path] for path in rest]
    for start, tests in NEAREST:
        if inside.startswith(start):
            return [[path] for path in tests]
    return [["tests"]]


class _Source(importlib.abc.Loader):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self._mutant.source, self._mutant.path, "exec"), vars(module))


class _Finder(importlib.abc.MetaPathFinder):
    """Gives the one module from changed source."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        dotted = mutant.path.removesuffix(".py").replace("/", ".")
        self._package = dotted.endswith(".__init__")
        self._name = dotted.removesuffix(".__init__")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        loader = _Source(self._mutant)
        file = str(ROOT / self._mutant.path)
        locations = [str(Path(file).parent)] if self._package else None
        return importlib.util.spec_from_file_location(
            name, file, loader=loader, submodule_search_locations=locations
        )


class _FirstOfAll(list[Any]):
    """A meta path whose first finder stays the first."""

    def insert(self, index: Any, item: Any) -> None:
        super().insert(max(1, index), item)


def survives(mutant: Mutant | None, tests: list[list[str]]) -> bool:
    """Whether no test fails; runs in a process of its own."""
    import pytest

    if mutant is not None:
        sys.meta_path = _FirstOfAll([_Finder(mutant), *sys.meta_path])
    for arguments in tests:
        quiet = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-p",
            "no:randomly",
            "-p",
            "no:html",
            "--no-header",
        ]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = pytest.main([*arguments, *quiet])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return False
    return True


def forked(mutant: Mutant | None, tests: list[list[str]]) -> int:
    """Start the tests in a forked process.

    Returns:
        Its process id.
    """
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(LIMIT)
    os.setpgrp()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    status = 2
    try:
        status = 0 if survives(mutant, tests) else 1
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for library in ("accelerate", "bitsandbytes", "hypothesis", "peft", "transformers", "_pytest.pytester"):
        importlib.import_module(library)

    waiting = drawn(options.number, options.seed)
    running: dict[int, tuple[Mutant, float]] = {}
    survived: list[Mutant] = []
    done = 0
    while waiting or running:
        while waiting and len(running) < options.jobs:
            mutant = waiting.pop(0)
            running[forked(mutant, nearest(mutant))] = mutant, time.monotonic()
        pid, status = os.wait()
        if pid not in running:
            continue
        mutant, begun = running.pop(pid)
        done += 1
        alive = os.waitstatus_to_exitcode(status) == 0
        survived += [mutant] if alive else []
        print(
            f"{done:>4} {'SURVIVED' if alive else 'killed  '} {time.monotonic() - begun:5.0f} s  {mutant}",
            flush=True,
        )
    killed = done - len(survived)
    print(f"{killed} of {done} killed: {100 * killed / done:.1f} %")
    if options.json:
        result = {
            "seed": options.seed,
            "mutants": done,
            "killed": killed,
            "survived": [str(m) for m in survived],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
