"""Findings in the page of pytest-html, where that is installed and asked for."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pytest_lora.values import printable

if TYPE_CHECKING:
    import pytest

    from pytest_lora.findings import Report


def add(report: pytest.TestReport, judged: Sequence[Report], config: pytest.Config) -> None:
    """Put what was judged in a phase under its test; healthy reports are one line."""
    plugin: Any = config.pluginmanager.get_plugin("html")
    if plugin is not None and hasattr(plugin, "extras"):
        extended: Any = report
        extended.extras = [
            *getattr(report, "extras", ()),
            *(plugin.extras.html(_element(one)) for one in judged),
        ]


def _element(report: Report) -> str:
    return f'<pre class="lora-report">{escape(printable(str(report)))}</pre>'
