"""What tests on a real GPU need."""

from __future__ import annotations

import pytest

from tests.plugin.simulated import shared


@pytest.fixture(autouse=True)
def _own_sessions(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let sessions that a test starts share the GPU among themselves: it holds its part of it already."""
    if "pytester" not in request.fixturenames:
        return
    shared(monkeypatch, request.getfixturevalue("pytester").path)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "RUN_SLOW", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
