"""Small bases, batches and saved adapters, under the names that the examples of rules use.

``from pytest_lora.bases.examples import base, batch`` gives a fresh base, and a batch for it, each time it is asked.
Nothing heavy is imported before.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from typing import Any

_MODELS = (
    "base",
    "base_4bit",
    "tied_base",
    "classifier_base",
    "moe_base",
    "gpt2_base",
    "fused_moe_base",
    "vision_language_base",
    "torch_attention_base",
    "batchnorm_base",
    "image_text_base",
    "grid_base",
    "batch",
    "classifier_batch",
    "image_batch",
    "image_text_batch",
    "grid_batch",
    "llama_7b",
    "gptq_7b",
    "fused_moe",
    "shared_experts",
)
_FUNCTIONS = {
    "models": ("adapter", "quantized"),
    "folders": (
        "add_base_weights",
        "configure",
        "cut",
        "edit",
        "pickle_weights",
        "remove",
        "rename",
        "write",
        "write_sparse",
    ),
    "ranks": ("in_one_process", "step_in_ddp", "step_without_synchronisation"),
}
__all__ = sorted((*_MODELS, *(name for names in _FUNCTIONS.values() for name in names)))

_FROM = {"torch": "", "nn": "torch", **dict.fromkeys(("LoraConfig", "PeftModel", "get_peft_model"), "peft")}
"""Names of other packages that an example may use without an import, and where they come from."""

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODELS:
        # An import statement asks whether the name is there before it takes it, and so has two made: 5 ms for a base.
        return import_module(f"{__name__}.models").made(name)
    for module, names in _FUNCTIONS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def runnable(doc: str) -> str:
    """The documentation of a rule, its examples with the imports that they need, so that they run as they stand."""
    return _BLOCK.sub(lambda block: f"```python\n{with_imports(block[1])}```", doc)


def with_imports(code: str) -> str:
    """An example with the imports of what it uses and does not define."""
    homes: dict[str, list[str]] = {}
    for home, name in sorted(set(_imports(code))):
        homes.setdefault(home, []).append(name)
    lines = [
        f"from {home} import {', '.join(names)}" if home else f"import {names[0]}"
        for home, names in homes.items()
    ]
    return "\n".join([*lines, "", code]) if lines else code


def _imports(code: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import that is needed; no module for what is imported as a whole."""
    import pytest_lora

    public = {name for name in dir(pytest_lora) if not name.startswith("_")}
    for name in _used(ast.parse(code)):
        if name in _FROM:
            yield _FROM[name], name
        elif name in public:
            yield "pytest_lora", name
        elif name in __all__:
            yield __name__, name


def _used(tree: ast.Module) -> Iterator[str]:
    """Names that a statement reads and none before it has bound."""
    bound = set(dir(builtins))
    for statement in tree.body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        yield from {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound
        bound |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            bound.add(statement.name)
