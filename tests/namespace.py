"""Bases, batches and saved adapters of the examples, by name; adapters go into a folder of the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pytest_lora.bases import examples


class Namespace(dict[str, Any]):
    """Names for one test; a base or batch is built when it is first mentioned."""

    def __init__(self, scratch: Path) -> None:
        super().__init__()
        self.scratch = scratch

    def adapter(self, on: nn.Module | None = None, **fields: Any) -> Path:
        """Folder of a saved adapter; fields of LlamaConfig among the others make it one of another base."""
        path: Path = examples.adapter(on, folder=self.scratch, **fields)
        return path

    def __missing__(self, name: str) -> Any:
        if name == "adapter":
            return self.adapter
        self[name] = getattr(examples, name)
        return self[name]


def run(code: str) -> Any:
    """Run an example as it is printed, and hand back the report that it made."""
    namespace: dict[str, Any] = {}
    exec(compile(examples.with_imports(code), "<example>", "exec"), namespace)
    return namespace["report"]
