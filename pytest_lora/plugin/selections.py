"""``select``, ``ignore`` and ``strict`` of a session and of marks, in force while a test runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_lora.plugin.session_options import options_of
from pytest_lora.rules.selection import EVERYTHING, Selection, applied, codes

if TYPE_CHECKING:
    from collections.abc import Generator

_NAME = "lora-selections"


def enable(config: pytest.Config) -> None:
    """Let selections be in force from the next test on.

    Raises:
        pytest.UsageError: A code of the command line or the ini file does not exist.
    """
    if config.pluginmanager.has_plugin(_NAME):
        return
    options = options_of(config)
    try:
        session = Selection(
            codes("--lora-select", options.select), codes("--lora-ignore", options.ignore), options.strict
        )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(_InForce(session), _NAME)


class _InForce:
    """Puts the selection of each test in force."""

    def __init__(self, session: Selection) -> None:
        self._session = session

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Set-up, call and teardown of a test look at the selection of its marks and of the session."""
        with applied(of(item, self._session)):
            return (yield)


def of(item: pytest.Item, session: Selection = EVERYTHING) -> Selection:
    """The selection of a test: the closest ``select`` wins, what is ignored adds up.

    Raises:
        ValueError: A code does not exist, or ``strict`` is neither True nor False.
    """
    from pytest_lora.plugin.markers import farthest_first

    select, ignore, strict = session.select, session.ignore, session.strict
    for mark in farthest_first(item, "lora"):
        given = mark.kwargs
        if "select" in given:
            select = codes(f"{item.nodeid}: @pytest.mark.lora: select", given["select"])
        if "ignore" in given:
            ignore += codes(f"{item.nodeid}: @pytest.mark.lora: ignore", given["ignore"])
        if "strict" in given:
            if not isinstance(given["strict"], bool):
                raise ValueError(
                    f"{item.nodeid}: @pytest.mark.lora: strict must be True or False, not {given['strict']!r}"
                )
            strict = given["strict"]
    return Selection(select, ignore, strict)
