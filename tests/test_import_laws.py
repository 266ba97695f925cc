"""Imports point one way, and loading the plugin imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pytest_lora

PACKAGE = Path(pytest_lora.__file__).parent
HEAVY = ("torch", "numpy", "transformers", "peft", "bitsandbytes", "hypothesis", "accelerate", "safetensors")

LOWEST = {
    "arguments",
    "changes",
    "expect",
    "facts",
    "files",
    "findings",
    "patterns",
    "values",
}
MIDDLE = {"counting", "memory", "bases"}
FLOORS = {
    **dict.fromkeys(sorted(LOWEST), LOWEST),
    "rules": LOWEST | {"rules"},
    "report": LOWEST | {"rules", "report"},
    "inspection": LOWEST | {"inspection"},
    **dict.fromkeys(sorted(MIDDLE), LOWEST | MIDDLE | {"inspection"}),
    "checks": LOWEST | MIDDLE | {"checks", "inspection", "rules"},
    "assertions": LOWEST | {"checks", "inspection", "rules"},
    **{
        part: LOWEST | MIDDLE | {part, "assertions", "checks", "inspection", "rules"}
        for part in ("strategies", "sweep")
    },
    "runs": LOWEST | MIDDLE | {"assertions", "checks", "inspection", "rules", "runs", "sweep"},
}
"""What each part of the package may import from the package; the plugin and its command line may import all."""


def modules(part: str) -> list[Path]:
    home = PACKAGE / part
    return sorted(home.rglob("*.py")) if home.is_dir() else [PACKAGE / f"{part}.py"]


@cache
def imports(file: Path) -> frozenset[str]:
    """Modules that a file imports."""
    return frozenset(_imports(ast.parse(file.read_text())))


def _imports(tree: ast.AST) -> Iterator[str]:
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("pytest_lora.")}


@pytest.mark.parametrize("part", FLOORS)
def test_imports_point_one_way(part: str) -> None:
    known = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    for file in modules(part):
        assert own(file) & known <= FLOORS[part], file


def test_no_module_imports_one_that_imports_it() -> None:
    files = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    # "from package import module" asks nothing of the package's own __init__.
    packages = {name for name, file in files.items() if file.name == "__init__.py"}
    graph = {
        name: {
            wanted
            for wanted in imports(file) & set(files)
            if wanted not in packages or not any(one.startswith(f"{wanted}.") for one in imports(file))
        }
        for name, file in files.items()
    }
    TopologicalSorter(graph).prepare()  # names the circle


def test_every_part_of_the_package_has_its_floor() -> None:
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert parts - {"__init__", "__main__", "plugin"} == set(FLOORS)


@pytest.mark.parametrize("part", ["facts", "findings", "changes", "expect", "rules"])
def test_facts_and_rules_never_import_heavy_packages(part: str) -> None:
    for file in modules(part):
        assert not {name.split(".")[0] for name in imports(file)} & set(HEAVY), file


def test_only_strategies_import_hypothesis() -> None:
    for part in {*FLOORS, "plugin"} - {"strategies"}:
        for file in modules(part):
            assert "hypothesis" not in {name.split(".")[0] for name in imports(file)}, file


def test_only_the_plugin_imports_pytest() -> None:
    for part in FLOORS:
        for file in modules(part):
            assert "pytest" not in {name.split(".")[0] for name in imports(file)}, file


@pytest.mark.parametrize(
    "module", ["pytest_lora", "pytest_lora.plugin", "pytest_lora.rules", "pytest_lora.assertions"]
)
def test_loading_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def loaded_with(name: str) -> set[str]:
    """Modules of the package that are loaded with one of them."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        path = PACKAGE.parent / name.replace(".", "/")
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)
        if file is None or name in found:
            continue
        found.add(name)
        top: list[ast.stmt] = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ImportFrom)]
        waiting += [one for one in _imports(ast.Module(top, [])) if one.startswith("pytest_lora.")]
    return found


@pytest.mark.parametrize("module", ["checks.model", "inspection.model", "checks.config", "inspection.config"])
def test_a_look_at_a_model_loads_no_facts_of_trainings_and_memory(module: str) -> None:
    found = loaded_with(f"pytest_lora.{module}")
    assert "pytest_lora.facts.base" in found
    others = ("behaviour", "curve_shape", "history", "memory", "optimizer", "steps", "training")
    assert not found & {f"pytest_lora.facts.{one}" for one in others}


def test_public_names_are_declared_for_type_checkers_and_load() -> None:
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    declared = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest_lora.")
        for alias in node.names
    }
    assert declared == set(pytest_lora.__all__)
    for name in pytest_lora.__all__:
        assert getattr(pytest_lora, name).__name__ == name
    everything: dict[str, object] = {}
    exec("from pytest_lora import *", everything)
    assert declared <= set(everything)
    assert declared <= set(dir(pytest_lora))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pytest_lora.nonsense
