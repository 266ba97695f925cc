"""Whatever a stranger calls something, no output says it raw: terminal, annotations, pages, files for other tools."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _pytest.junitxml import LogXML
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_lora.findings import Report
from pytest_lora.plugin import file_nodes, github, summary
from pytest_lora.report import baseline, rendered
from pytest_lora.report.session import Session
from tests.report.sample import worded
from tests.report.test_page import Outline
from tests.test_cleaning import SPARKS, is_harmless

OTHERS = (
    *(
        "]]>",
        "</script>",
        "<script>alert(1)</script>",
        "-->",
        "<!--",
        "&#27;",
        "</details>",
        '"',
        "'",
        "`",
        "|",
    ),
    *(
        "\x9b31m",
        "\x9d0;t\x9c",
        "\udc80",
        "\ud83d",
        "\u2029",
        "\v",
        "\f",
        "\x7f",
        "```\n",
        "\n\n::stop-commands::x",
    ),
)
WORST = "".join((*SPARKS, *OTHERS))
hostile = st.lists(st.sampled_from((*SPARKS, *OTHERS)) | st.text(max_size=3), min_size=1, max_size=8).map(
    "".join
)


def texts(value: object) -> Iterator[str]:
    """Every text in what JSON holds, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for part in pair for text in texts(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in texts(part))


def terminal(session: Session) -> Iterator[str]:
    """The lines of the section "LoRA health", with ``-vv``, and what a failing item says."""
    judged: dict[str, list[Report]] = {test.nodeid: list(test.reports) for test in session.judged}
    found = {nodeid: [f for report in own for f in report.findings] for nodeid, own in judged.items()}
    yield from summary.subject_lines(judged.values())
    yield from summary.left_lines(judged)
    yield from (line for _, line in summary.rule_lines(found))
    yield from summary.detail_lines(judged, [], 80)
    rows = baseline.compare({}, {nodeid: dict(own[0].measured) for nodeid, own in judged.items()})
    yield from baseline.table(rows)
    for own in judged.values():
        for report in own:
            yield from file_nodes.wrapped(str(report), 80)


def junit(session: Session) -> str:
    """What pytest writes of a test's properties."""
    log: Any = LogXML("junit.xml", None)
    reporter = log.node_reporter(session.judged[0].nodeid)
    for report in session.judged[0].reports:
        reporter.add_property(summary.PROPERTY, report.to_json())
    return ET.tostring(reporter.to_xml(), encoding="unicode")


CALM = Outline(rendered(worded("calm"), "a.html"))


@settings(deadline=None, max_examples=25)
@example(WORST)
@given(hostile)
def test_no_output_says_anything_raw(text: str) -> None:
    session = worded(text)
    for name in ("a.md", "a.json", "a.sarif", "gl-code-quality.json", "a.html"):
        written = rendered(session, name)
        assert is_harmless(written), name
        written.encode()
        if name.endswith(("json", "sarif")) and name != "a.json":
            assert all(map(is_harmless, texts(json.loads(written)))), name
    outline = Outline(rendered(session, "a.html"))
    assert set(outline.tags) <= set(CALM.tags)
    assert len(outline.scripts) == len(CALM.scripts)
    for line in terminal(session):
        assert is_harmless(line), line
    for report in session.judged[0].reports:
        assert is_harmless(summary._element(report))
        assert is_harmless(report._repr_html_())
    for annotation in map(str, github.annotated(session, Path("/repo"))):
        assert annotation.isprintable()
        assert annotation.startswith(("::error file=", "::warning file="))
        assert "##[" not in annotation
    ET.fromstring(junit(session))
    assert is_harmless(junit(session))
