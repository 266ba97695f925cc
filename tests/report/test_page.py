"""The page: nothing from outside becomes markup, it stays small, and it says how the session ended."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.findings import Finding, Report
from pytest_lora.report import rendered
from pytest_lora.report.page import page
from pytest_lora.report.text import rule_doc
from pytest_lora.rules import catalogue
from tests.report.sample import BUDGET, MAP, MERGED, SESSION, ran, worded

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</script><script>alert(1)</script>",
    "</style><style>body{display:none}",
    "<!-- <script>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:alert(1)",
    "\x00\x1b[31m\x07\x08 \u202egnp.exe \u2028 \ud800",
    "&lt;script&gt; &#x3c;",
    "]]>\x0c\x0b\r\n",
]


class Outline(HTMLParser):
    """Tags and attributes of a page in their order, its text, and what its scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles = 0
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "wbr" and not attrs:
            return  # where a line may break in the id of a test
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]
        self._inside = tag
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", ()))


CALM = Outline(page(worded("calm")))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_never_markup(text: str) -> None:
    html = page(worded(text))
    outline = Outline(html)
    assert sorted(outline.tags) == sorted(CALM.tags)
    assert outline.scripts[-1] == CALM.scripts[-1]
    assert not any(name.startswith("on") for _, names in outline.tags for name in names)
    assert all(link.startswith(("#", "data:,", "https://")) for link in outline.links)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u2028-\u202e\ud800-\udfff]", html)
    html.encode()
    for script in outline.scripts[:-1]:
        assert json.loads(script)["ranks"] == [[8, 1]]


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec=None), max_size=20) | st.text("<>\"'&/!-{}%\\", max_size=12))
def test_no_text_changes_the_structure(text: str) -> None:
    # An id is a list of words to CSS and empty texts leave out elements, so that there is always something to see.
    assert sorted(Outline(page(worded(f"a{text}b"))).tags) == sorted(CALM.tags)


def test_what_is_hidden_is_shown_as_escapes() -> None:
    texts = "".join(Outline(page(worded("a\x1bb\u202ec\ud800d"))).texts)
    assert r"a\x1bb\u202ec\ud800d" in texts


def test_the_page_asks_nothing_of_a_network() -> None:
    html = page(SESSION)
    links = [names for tag, names in Outline(html).tags if tag in ("img", "iframe", "link", "object")]
    assert links == [("rel", "href")]  # the icon, which is empty
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(" not in html


def many(number: int, **fields: Any) -> Any:
    def finding(n: int) -> Finding:
        return dataclasses.replace(
            MERGED, code=f"LORA2{n % 40:02}", where=f"module {n} of model.layers", **fields
        )

    tests = tuple(
        ran(f"tests/test_many.py::test_adapter[{n}]", "failed", Report("m", (finding(n),), (MAP, BUDGET)))
        for n in range(number)
    )
    return dataclasses.replace(SESSION, tests=tests, counts=(("failed", number),), collected=number)


def test_two_thousand_findings_stay_under_two_megabytes() -> None:
    html = page(many(2000))
    assert len(html.encode()) < 2_000_000
    texts = "".join(Outline(html).texts)
    assert "2000 of 2000 tests found errors" in texts
    assert texts.count("call model.unmerge_adapter()") > 1000
    long = page(many(2000, observed="x" * 50_000))
    assert len(long.encode()) < 2_000_000
    assert "more findings of this rule are not shown here" in long


@pytest.mark.parametrize(
    ("state", "problem", "words"),
    [
        (
            "running",
            "",
            "This session has not ended after 40 of 50 tests. It still runs, or its process was killed.",
        ),
        (
            "interrupted",
            "KeyboardInterrupt",
            "This session was interrupted after 40 of 50 tests: KeyboardInterrupt.",
        ),
        ("crashed", "ValueError: x", "This session crashed after 40 of 50 tests: ValueError: x."),
    ],
)
def test_a_session_that_did_not_end_says_so(state: Any, problem: str, words: str) -> None:
    session = dataclasses.replace(SESSION, state=state, problem=problem, collected=50)
    assert words in " ".join("".join(Outline(page(session)).texts).split()).replace(" .", ".")
    assert "This session" not in "".join(Outline(page(SESSION)).texts)


def test_a_session_without_any_check_is_a_page_too() -> None:
    empty = dataclasses.replace(SESSION, tests=(), counts=(), seeds=(), versions=())
    text = " ".join("".join(Outline(page(empty)).texts).split())
    assert "No test judged a LoRA set-up" in text
    assert "no test ended" in text
    assert "Findings" not in text


def test_errors_come_first_and_equal_findings_are_one() -> None:
    html = page(SESSION)
    assert re.findall(r'<details class="rule (\w+)" id="(\w+)"', html) == [
        ("error", "LORA203"),
        ("error", "LORA502"),
        ("warning", "LORA127"),
        ("info", "LORA129"),
    ]
    assert html.count(MERGED.fix) == 1
    assert "2 findings in 2 tests" in html


def test_what_is_not_hidden_is_shown_as_it_is() -> None:
    shown = "".join(Outline(page(SESSION)).texts)
    assert "\\x" not in shown
    assert re.search(r"\d\xa0%", shown)


def test_a_rule_of_the_style_is_about_one_kind_of_element() -> None:
    """What moves the marks of a plot would move those within the icons too."""
    html = page(SESSION)
    of_icons = set(re.findall(r'<path class="(\w+)"', html[: html.index("<header")]))
    style = html[html.index("<style") : html.index("</style>")]
    assert of_icons
    assert all(len(re.findall(rf"^\.{name}\b", style, re.MULTILINE)) == 1 for name in of_icons)


def test_every_rule_can_be_explained_on_the_page() -> None:
    for rule in catalogue():
        outline = Outline(str(rule_doc(rule.doc)))
        assert {tag for tag, _ in outline.tags} <= {"h3", "p", "ul", "li", "pre", "code", "a"}, rule.code
        assert [
            text
            for tag, text in zip([t for t, _ in outline.tags], outline.texts, strict=False)
            if tag == "h3"
        ]
        shown = re.sub(r"\W", "", "".join(outline.texts))
        told = re.sub(
            r"\W|^##.*$", "", re.sub(r"^```\w*$", "", rule.doc.partition("\n")[2], flags=re.MULTILINE)
        )
        assert shown == told, rule.code


def test_json_is_strict_and_whole() -> None:
    data = json.loads(rendered(SESSION, "a.json"), parse_constant=lambda word: pytest.fail(word))
    assert data["format"] == 1
    assert data["counts"] == {"failed": 4, "passed": 32, "skipped": 4}
    assert len(data["tests"]) == len(SESSION.tests)
    assert [Report.from_json(json.dumps(report)) for report in data["tests"][1]["reports"]] == list(
        SESSION.tests[1].reports
    )
    with pytest.raises(
        ValueError, match=r"there is no report in .a.pdf.; known are .sarif.json, .sarif, .html, .md, .json"
    ):
        rendered(SESSION, "a.pdf")


def test_the_command_that_runs_the_first_failure_again() -> None:
    assert "pytest tests/test_adapter.py::test_merged</code>" in page(SESSION)
    passed = tuple(dataclasses.replace(test, outcome="passed") for test in SESSION.tests)
    assert "The first that failed" not in page(dataclasses.replace(SESSION, tests=passed))


def test_a_failure_by_a_warning_is_no_other_failure() -> None:
    message = "pytest_lora.findings.LoraHealthWarning: warning[LORA127]: scaling differs from expected"
    strict = dataclasses.replace(SESSION.tests[5], outcome="failed", message=message)
    assert "Other failures" not in page(dataclasses.replace(SESSION, tests=(strict,)))
    assert "Other failures" in page(
        dataclasses.replace(SESSION, tests=(dataclasses.replace(strict, message=""),))
    )


def test_what_gpu_tests_left_behind_is_told() -> None:
    use = SESSION.tests[7].gpu
    assert use is not None
    gpu = dataclasses.replace(use, left_bytes=2**20)
    html = page(dataclasses.replace(SESSION, tests=(dataclasses.replace(SESSION.tests[7], gpu=gpu),)))
    assert "tests/test_gpu.py::test_step left 1.0 MiB (1048576 bytes) allocated on cuda:0</p>" in html
