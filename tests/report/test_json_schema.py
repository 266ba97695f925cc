"""The published schema of the report's JSON, the frame of findings, and the card in a notebook."""

from __future__ import annotations

import dataclasses
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pytest_lora import Finding, Report
from pytest_lora.checks import NAMES_A_BASE
from pytest_lora.report import rendered
from pytest_lora.report.session import FORMAT, GpuUse, RanTest, Session
from tests.plugin.sessions import run
from tests.report.sample import MERGED, RANDOM, SCALING, SESSION, worded
from tests.report.test_code_review import HOSTILE, validated

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())


def strict(schema: Any) -> Any:
    """The schema, which then knows every field: the published one lets new ones come."""
    if isinstance(schema, dict):
        closed = (
            {"additionalProperties": False}
            if "properties" in schema and "kind" not in schema["properties"]
            else {}
        )
        return {**closed, **{name: strict(one) for name, one in schema.items()}}
    return [strict(one) for one in schema] if isinstance(schema, list) else schema


def test_reports_hold_to_the_published_schema(pytester: pytest.Pytester) -> None:
    for session in (SESSION, worded(HOSTILE)):
        validated(rendered(session, "report.json"), strict(SCHEMA))
    (pytester.path / "recipe.yaml").write_text(
        "adapter: lora\nlora_r: 8\nbase_model: acme/base\nlora_typo: 1\n"
    )
    pytester.makepyfile("def test_fails_otherwise(): assert 0")
    run(pytester, "--lora-recipes=recipe.yaml", "--lora-report=report.json")
    data = validated((pytester.path / "report.json").read_text(), strict(SCHEMA))
    (report,) = (one for test in data["tests"] for one in test["reports"])
    assert {one["why"] for one in report["not_judged"]} == {
        f"base not known; {NAMES_A_BASE}",
        "no card given",
    }
    assert [one["kind"] for one in report["figures"]] == ["recipe"]
    assert Report.from_json(json.dumps(report)).to_json() == json.dumps(report)


def test_the_schema_asks_for_what_the_classes_have() -> None:
    parts = SCHEMA["definitions"]
    assert SCHEMA["properties"]["format"] == {"const": FORMAT}
    for made, named in ((Finding, "finding"), (RanTest, "test"), (GpuUse, "gpu")):
        names = {field.name for field in dataclasses.fields(made)}
        assert set(parts[named]["properties"]) == set(parts[named]["required"]) == names
    assert set(SCHEMA["properties"]) == {"format", *(field.name for field in dataclasses.fields(Session))}


def test_findings_as_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    frame = Report("model", (SCALING, MERGED)).to_dataframe()
    assert list(frame["code"]) == ["LORA203", "LORA127"]
    assert set(frame["subject"]) == {"model"}
    assert list(frame.columns) == ["subject", *(field.name for field in dataclasses.fields(Finding))]
    assert list(Report("model").to_dataframe().columns) == list(frame.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^Report.to_dataframe needs pandas: pip install pandas$"):
        Report("model").to_dataframe()


def test_the_card_of_a_notebook_is_small_closed_and_harmless() -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.seen: set[str] = set()
            self.text = ""

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.open.append(tag)
            self.seen.add(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

        def handle_data(self, data: str) -> None:
            self.text += data

    wild = dataclasses.replace(MERGED, where="<script>alert(1)</script>", fix="a & b <b>")
    for report in (Report("model of <i>"), Report("model", (wild, SCALING, RANDOM))):
        card, tags = report._repr_html_(), Tags()
        tags.feed(card)
        assert tags.open == []
        assert tags.seen <= {"div", "b", "details", "summary", "code"}
        assert report.subject in tags.text
    assert "1 error, 1 warning, 1 info" in tags.text
    assert "<script>alert(1)</script>" in tags.text
    assert card.count("<details open") == 1
    assert len(card) < 3000
    assert Report("model")._repr_html_().count("healthy") == 1
