"""Facts with some fields changed."""

from __future__ import annotations

import dataclasses
from typing import Any


def replace(fact: Any, /, **fields: Any) -> Any:
    """A fact with other fields, be it a dataclass or a named tuple, as ``copy.replace`` of Python 3.13 does."""
    return fact._replace(**fields) if isinstance(fact, tuple) else dataclasses.replace(fact, **fields)
