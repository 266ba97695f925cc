"""Functions of the libraries that another takes the place of, while a step runs on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pytest_lora.inspection.quiet import alone


@contextmanager
def swapped(replaced: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put functions in the place of others, by module or class and name; what was inherited is so again afterwards."""
    missing = object()
    with alone:
        before = [(home, name, vars(home).get(name, missing)) for home, name, _ in replaced]
        try:
            for home, name, function in replaced:
                setattr(home, name, function)
            yield
        finally:
            for home, name, function in before:
                if function is missing:
                    delattr(home, name)
                else:
                    setattr(home, name, function)
