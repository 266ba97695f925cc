"""Fixtures that the tests of this repository share."""

import os

import pytest

LEFT_OUT = "-p no:randomly -p no:anyio -p no:html -p no:metadata"
"""Plugins that sessions within tests do without: one shuffles their tests, the others take half of their start."""

# Several workers with several threads each would only wait for each other: the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _sessions_of_their_own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that a test starts are no workers of this one, and their tests keep the order they are written in."""
    if "pytester" in request.fixturenames:
        request.getfixturevalue("pytester")  # which clears PYTEST_ADDOPTS
        monkeypatch.setenv("PYTEST_ADDOPTS", LEFT_OUT)
        for name in ("PYTEST_XDIST_WORKER", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
            monkeypatch.delenv(name, raising=False)
