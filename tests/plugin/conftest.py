"""What sessions in this process need."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import pytest_lora.plugin


@pytest.fixture(scope="session", autouse=True)
def _libraries() -> None:
    """Load what such sessions load, before pytester takes its snapshot: it drops what is loaded after it.

    torch and numpy cannot be loaded twice, and of other modules there would be two.
    """
    from pytest_lora.bases.tiny import load_tiny

    load_tiny()
    own = [one.name for one in pkgutil.walk_packages(pytest_lora.plugin.__path__, "pytest_lora.plugin.")]
    for name in ("peft", "pytest_lora.checks", "pytest_lora.memory.estimate", *own):
        importlib.import_module(name)
