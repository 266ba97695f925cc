"""Tests for LoRA and QLoRA set-ups: inspected into plain facts, judged by rules, reported by pytest.

Public names are loaded on first use, so that importing this package costs nothing. The one list of them is the stub
beside this file, from which type checkers know them too.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any


class _Plainly:
    """Finds the modules of this package before pytest does.

    pytest rewrites every module of a distribution that has a plugin, which costs more than to run them. Nothing is to
    be explained of their assertions. Where pytest does not rewrite, this is not in the way of imports.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        """The module as Python itself finds it; None for those of others."""
        if not name.startswith(f"{__name__}."):
            return None
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, path, target)


@cache
def _homes() -> dict[str, str]:
    """The module of each public name."""
    import re
    from pathlib import Path

    stub = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    return {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as \w+$", stub, re.MULTILINE)}


def __getattr__(name: str) -> Any:
    homes = _homes()
    if name == "__all__":
        return sorted(homes)
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})


if "_pytest.assertion.rewrite" in sys.modules:
    sys.meta_path.insert(0, _Plainly)
