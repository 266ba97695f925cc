"""Applies the steps of a fix to the script that has the fault, as a reader of the message would edit it."""

from __future__ import annotations

import ast
import builtins
import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load, save_file

import pytest_lora
from pytest_lora.bases import examples
from tests.rules.remedies.words import Step

CONFIG_FIELDS = frozenset(LoraConfig.__dataclass_fields__)
OF_FILES = {"load": load, "save_file": save_file}
"""What a fix about a saved adapter takes for granted, beside ``file``: the file of its weights."""

KNOWN = frozenset({"torch", "nn", *OF_FILES, *pytest_lora.__all__, *examples.__all__})
MEANT = "meant"
"""The variable that holds what an example compares with; no fix changes it."""


def executed(source: str) -> dict[str, Any]:
    """The names of a script after it ran, from fixed random numbers."""
    names: dict[str, Any] = dict(OF_FILES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        exec(compile(examples.with_imports(source), "<script>", "exec"), names)
    return names


def mended(source: str, steps: Iterable[Step]) -> str | None:
    """The script after these steps; None where one of them is about nothing that the script has."""
    tree = ast.parse(source)
    for step in steps:
        applied = _set_keyword(tree, step) if step.is_keyword else _take(tree, step)
        if not applied:
            return None
    return ast.unparse(ast.fix_missing_locations(tree))


def _take(tree: ast.Module, step: Step) -> bool:
    node = step.node
    call = node.value if isinstance(node, ast.Expr) else None
    if isinstance(call, ast.Call):
        if _name(call) == "Expect":
            return _expect(tree, call)
        if call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value is ...:
            return _extend(tree, call)
    read, known = _names_read(node), _names_known(tree)
    if "file" in read and "path" in known - KNOWN:
        place = _place(tree, step)
        tree.body.insert(place, ast.parse("file = path / 'adapter_model.safetensors'").body[0])
        known.add("file")
    if not read <= known:
        return False
    tree.body.insert(_place(tree, step), node)
    return True


def _place(tree: ast.Module, step: Step) -> int:
    early = "before get_peft_model" in step.after
    return next(
        i
        for i, node in enumerate(tree.body)
        if _makes_report(node) or (early and "get_peft_model" in ast.unparse(node))
    )


def _makes_report(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "report"


def _set_keyword(tree: ast.Module, step: Step) -> bool:
    assert isinstance(step.node, ast.Assign)
    name = ast.unparse(step.node.targets[0])
    calls = list(_calls(tree))
    written = [call for call in calls if name in {k.arg for k in call.keywords}]
    configs = [call for call in calls if _name(call) == "LoraConfig"] if name in CONFIG_FIELDS else []
    takers = written or configs or [call for call in _report_calls(tree) if _takes(call, name)]
    for call in takers:
        _put(call, name, step.node.value)
    if not takers and name in CONFIG_FIELDS and "path" in _names_known(tree):
        tree.body.insert(_place(tree, step), ast.parse(f"configure(path, {step.code})").body[0])
        return True
    return bool(takers)


def _extend(tree: ast.Module, example: ast.Call) -> bool:
    same = [call for call in _calls(tree) if _name(call) == _name(example)]
    for call in same:
        for keyword in example.keywords:
            _put(call, str(keyword.arg), keyword.value)
    return bool(same)


def _expect(tree: ast.Module, example: ast.Call) -> bool:
    (call,) = _report_calls(tree)
    given = next((k.value for k in call.keywords if k.arg == "expect"), None)
    if isinstance(given, ast.Call):
        for keyword in example.keywords:
            _put(given, str(keyword.arg), keyword.value)
    else:
        _put(call, "expect", example)
    return True


def _put(call: ast.Call, name: str, value: ast.expr) -> None:
    call.keywords = [k for k in call.keywords if k.arg != name] + [ast.keyword(name, value)]


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    """Every call, less those that say what is expected."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == MEANT:
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and _name(node) != "Expect":
                yield node


def _report_calls(tree: ast.Module) -> list[ast.Call]:
    made = [node.value for node in tree.body if isinstance(node, ast.Assign) and _makes_report(node)]
    return [value for value in made if isinstance(value, ast.Call)]


def _takes(call: ast.Call, name: str) -> bool:
    function: Any = getattr(pytest_lora, _name(call), None)
    return function is not None and name in inspect.signature(function).parameters


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _names_read(node: ast.AST) -> set[str]:
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return read - bound - set(dir(builtins))


def _names_known(tree: ast.Module) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | KNOWN
