"""The report in Markdown: it renders as meant, and nothing from outside becomes markup."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pytest_lora.report.markdown import markdown_report
from pytest_lora.report.text import markdown, markdown_block, markdown_code
from pytest_lora.values import printable
from tests.report.sample import MERGED, SESSION, worded
from tests.report.test_page import HOSTILE, many

RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def tokens(text: str) -> list[Any]:
    return [inner for token in RENDERER.parse(text) for inner in (token, *(token.children or ()))]


def structure(text: str) -> list[str]:
    """Kinds of blocks and of what is in them, texts aside."""
    return sorted(token.type for token in tokens(text) if token.type not in ("text", "softbreak"))


CALM = structure(markdown_report(worded("calm")))


@pytest.mark.parametrize(
    "text", [*HOSTILE, "a|b", "`a` ``b``", "**a** _b_ ~~c~~", "[a](http://x)", "- a\n# b"]
)
def test_hostile_text_is_never_markup(text: str) -> None:
    report = markdown_report(worded(f"x{text}x"))
    assert structure(report) == CALM
    html = [token.content for token in tokens(report) if token.type in ("html_block", "html_inline")]
    assert all(one.startswith(("<details><summary>", "</details>")) for one in html)
    assert not any("<script" in one or "<img" in one for one in html)


@settings(max_examples=100, deadline=None)
@example("##[")
@given(st.text("ab_*`|\\<>[]()#-+!~&$ \n", max_size=12))
def test_any_text_reads_as_it_is(text: str) -> None:
    text = printable(f"a{text}b")  # "##[" would be a command to a service
    (inline,) = (token for token in RENDERER.parse(markdown(text)) if token.type == "inline")
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == " ".join(text.split())
    (code,) = (token for token in tokens(markdown_code(text)) if token.type == "code_inline")
    assert code.content == text.replace("\n", " ")
    table = RENDERER.parse(
        f"| x | y |\n| --- | --- |\n| {markdown_code(text, in_table=True)} | {markdown(text)} |"
    )
    first, second = (token.children for token in table if token.type == "inline" and token.map == [2, 3])
    assert [child.content for child in first] == [text.replace("\n", " ")]
    assert "".join(child.content for child in second) == " ".join(text.split())


def test_a_fix_of_several_lines_keeps_them() -> None:
    block = markdown_block("a ``` b\n        what if:\n          c", "    ")
    assert block == "    ````text\n    a ``` b\n    what if:\n      c\n    ````"


def test_a_report_reads_well() -> None:
    text = markdown_report(SESSION)
    assert text.startswith(
        "## LoRA report: support-bot\n\n❌ **3 of 7 tests found errors**\n\n"
        "| severity | rule | what | found |\n| --- | --- | --- | --- |\n"
        "| error | LORA203 | adapter left merged | 2 findings in 2 tests |\n"
    )
    assert f"- **{markdown(MERGED.where)}**\n  - observed: {MERGED.observed}\n" in text
    assert "- `tests/test_data.py::test_tokens`: AssertionError: assert 3 == 4" in text
    assert "| `self_attn.v_proj` | 3 | dead: no gradient reaches it | 32 | 2 | 0 | 0 |" in text
    assert "| loss over 20 steps | 4.02 | 0.71 | 82.3 % | 1 % |" in text
    assert "| ❌ | `r=1` | 68.0 GiB |" in text
    assert "**rank 8 is chosen** by accuracy" in text
    gpu = "| `tests/test_gpu.py::test_step` | cuda:0 | 36.0 GiB | 80.0 GiB | 37.0 GiB | 12.30 |"
    assert text.count(gpu) == markdown_report(SESSION, gpu_open=True).count(gpu) == 1
    assert "<summary>GPU tests</summary>" in text
    assert "### GPU tests" in markdown_report(SESSION, gpu_open=True)


def test_a_summary_of_many_findings_is_cut() -> None:
    text = markdown_report(many(2000, observed="x" * 3000))
    assert len(text.encode()) < 900_000
    assert "\n- and " in text


def test_states_and_empty_sessions() -> None:
    empty = dataclasses.replace(SESSION, tests=(), state="interrupted", problem="a*b", collected=50)
    text = markdown_report(empty)
    assert "No test judged a LoRA set-up" in text
    assert "**This session was interrupted** after 40 of 50 tests: a\\*b" in text
