"""Whether the marks of a test that begin with "lora" exist and say what they can say."""

from __future__ import annotations

import difflib

import pytest

from pytest_lora.plugin.gpu.marks import need_of
from pytest_lora.plugin.markers import OF_CHECKS, expect_for
from pytest_lora.plugin.options import GPU_NAMES, MARKERS

NAMES = tuple(text.partition(":")[0].partition("(")[0] for text in MARKERS)


def require_valid(item: pytest.Item) -> None:
    """Check the marks of a test that begin with "lora".

    Raises:
        pytest.Collector.CollectError: A mark is wrong.
    """
    names = {mark.name for mark in item.iter_markers() if mark.name.startswith("lora")}
    try:
        _require_known(item, names - set(NAMES))
        if "lora" in names:
            expect_for(item)
            _require_selection(item)
        if "lora_slow" in names:
            _require_bare(item)
        if names.intersection(GPU_NAMES):
            need_of(item)
    except (TypeError, ValueError) as error:
        raise pytest.Collector.CollectError(str(error)) from error


def _require_known(item: pytest.Item, names: set[str]) -> None:
    """Refuse what is nearly a marker of ours, unless it is registered as somebody else's."""
    registered = {line.partition(":")[0].partition("(")[0].strip() for line in item.config.getini("markers")}
    for name in sorted(names - registered):
        if close := difflib.get_close_matches(name, NAMES, n=1, cutoff=0.75):
            raise ValueError(f"{item.nodeid}: there is no marker {name!r}; did you mean {close[0]!r}?")


def _require_selection(item: pytest.Item) -> None:
    """Check what a mark selects or ignores, and let it be in force while its test runs."""
    if any(name in mark.kwargs for mark in item.iter_markers("lora") for name in OF_CHECKS):
        from pytest_lora.plugin import selections

        selections.of(item)
        selections.enable(item.config)


def _require_bare(item: pytest.Item) -> None:
    for mark in item.iter_markers("lora_slow"):
        for argument in (*mark.args, *mark.kwargs):
            raise ValueError(
                f"{item.nodeid}: @pytest.mark.lora_slow takes no arguments, and got {argument!r}"
            )
