"""Fixtures that the tests of this repository share."""

import gc
import importlib.metadata
import os
import sys
from collections.abc import Generator, Iterable

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
        monkeypatch.setattr(importlib.metadata, "distributions", request.getfixturevalue("_with_plugins"))


@pytest.fixture(scope="session")
def _with_plugins() -> object:
    """In the place of ``importlib.metadata.distributions``: pytest asks each session anew which of a hundred and more
    have plugins, which takes a fifth of a small session. Those in folders that a test adds are looked for."""
    installed = importlib.metadata.distributions
    known = set(sys.path)
    found = [one for one in installed() if any(point.group == "pytest11" for point in one.entry_points)]

    def distributions(**context: list[str]) -> Iterable[importlib.metadata.Distribution]:
        added = [folder for folder in sys.path if folder not in known]
        return installed(**context) if context else [*found, *installed(path=added)]

    return distributions
