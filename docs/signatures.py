"""The signatures of the API pages as Python itself shows them, where the source spells them with ``Unpack``."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

_SETTING = re.compile(r"^( *)setting: .*\n(?:\1 +.*\n)*", re.MULTILINE)
"""The entry on ``**setting`` in a docstring, of which nothing is left in the signature."""


class Signatures(griffe.Extension):
    """Gives every function with unpacked settings its parameters one by one, with their defaults."""

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **others: Any) -> None:
        """Replace ``**setting`` by what it stands for."""
        if not any("Unpack" in str(parameter.annotation) for parameter in func.parameters):
            return
        called = getattr(importlib.import_module(func.module.path), func.name, None)
        if called is not None:
            if func.docstring is not None:
                func.docstring.value = _SETTING.sub("", func.docstring.value)
            func.parameters = griffe.Parameters(
                *map(_parameter, inspect.signature(called).parameters.values())
            )


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    missing = inspect.Parameter.empty
    return griffe.Parameter(
        parameter.name,
        annotation=None if parameter.annotation is missing else str(parameter.annotation),
        kind=griffe.ParameterKind(parameter.kind.description),
        default=None if parameter.default is missing else repr(parameter.default),
    )
