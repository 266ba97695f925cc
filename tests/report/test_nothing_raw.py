"""Whatever a stranger calls something, no output says it raw: terminal, annotations, summary, pages, files for tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _pytest.junitxml import LogXML
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.findings import Report
from pytest_lora.plugin import details, github, html_extras, summary
from pytest_lora.plugin.recipe_table import lines as recipe_lines
from pytest_lora.report import rendered
from pytest_lora.report.session import Session
from tests.report.sample import worded
from tests.test_cleaning import SPARKS, is_harmless

ENDINGS = ("]]>", "</script>", "<script>alert(1)</script>", "-->", "<!--", "&#27;", "&lt;", "</details>", '"', "'")
OTHERS = ("\x9b31m", "\x9d0;t\x9c", "\udc80", "\ud83d", "\u2029", "\v", "\f", "\x7f", "`", "```\n", "|", "\n\n::stop-commands::x")
hostile = st.lists(
    st.sampled_from(SPARKS) | st.sampled_from(ENDINGS) | st.sampled_from(OTHERS) | st.text(max_size=3), min_size=1, max_size=8
).map("".join)

FILES = ("a.html", "a.md", "a.json", "a.sarif", "gl-code-quality.json")
