"""Fixtures that the tests of this repository share."""

import gc
import os
from collections.abc import Generator

import pytest

# Several workers with several threads each would only wait for each other: the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]

LEFT_OUT = " ".join(f"-p no:{name}" for name in ("randomly", "hypothesispytest", "anyio", "html", "metadata"))
"""Plugins of others that have no part in the sessions that tests start: they would shuffle, or take time to import."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: it is not looked through for garbage, now or later, which takes 0.4 s each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _sessions_of_their_own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that a test starts are no workers of this one, and have no more plugins than they need."""
    if "pytester" in request.fixturenames:
        request.getfixturevalue("pytester")  # which clears PYTEST_ADDOPTS
        monkeypatch.setenv("PYTEST_ADDOPTS", LEFT_OUT)
        for name in ("PYTEST_XDIST_WORKER", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
            monkeypatch.delenv(name, raising=False)
