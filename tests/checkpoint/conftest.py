"""A base and saved adapters of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.namespace import Namespace


@pytest.fixture
def names(tmp_path: Path) -> Namespace:
    """What the examples of rules may use: bases, and ``adapter`` that saves one into a folder of this test."""
    return Namespace(tmp_path)


@pytest.fixture
def base(names: Namespace) -> nn.Module:
    """A small Llama."""
    found: Any = names["base"]
    return found
