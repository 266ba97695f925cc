"""Damaged recipes: cut, shuffled, nested, aliased, huge. They give findings, never an exception, and soon."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_lora import check_recipe
from pytest_lora.inspection.recipe import MOST_UNKNOWN, is_likely, recipe_facts
from pytest_lora.inspection.recipe.beside import Tree
from tests.recipe.test_settings import AXOLOTL, FACTORY, OWN, SWIFT, TRL

MOST_SECONDS = 2.0

WORDS = (
    "~", "null", "no", "[]", "{}", "1e-4", "0,1", "-1", "1e999", ".nan", "!!binary x", "&a x", "*a", "${a.b}", "'", '"',
    "\t", "|", ">", "? x", "- x", "<<: *a", "999999999999999999999", "true", "[[[[[[", "{a: {b: {c: 1}}}", "../../etc",
    "/etc/passwd", "\u2028", "a: b: c", "%YAML 1.1", "---", "...", "@", "`", "lora_r: [1, 2]", "base_model: {a: 1}",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> str:
    lines = draw(st.sampled_from((AXOLOTL, FACTORY, TRL, SWIFT, OWN))).splitlines()
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(lines) - 1)))
        kind = draw(st.sampled_from(("cut", "swap", "value", "insert", "indent", "double", "nest")))
        line = lines[at] if lines else ""
        if kind == "cut":
            lines = [*lines[:at], line[: draw(st.integers(0, len(line)))], *lines[at + 1 :]]
        elif kind == "swap":
            lines = draw(st.permutations(lines))
        elif kind == "value":
            lines = [
                *lines[:at],
                f"{line.partition(':')[0]}: {draw(st.sampled_from(WORDS))}",
                *lines[at + 1 :],
            ]
        elif kind == "insert":
            lines = [*lines[:at], draw(st.sampled_from(WORDS) | st.text(max_size=20)), *lines[at:]]
        elif kind == "indent":
            lines = [*lines[:at], draw(st.sampled_from((" ", "  ", "\t", "- "))) + line, *lines[at + 1 :]]
        elif kind == "double":
            lines = lines * draw(st.integers(1, 4))
        else:
            lines = ["outer:", *(f"  {one}" for one in lines)]
    return "\n".join(lines) + draw(st.sampled_from(("", "\n", "\n" * 100)))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=damaged())
def test_damage_gives_findings_and_never_an_exception(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = tmp_path_factory.getbasetemp() / "damaged.yaml"
    recipe.write_text(text, encoding="utf-8", errors="surrogatepass")
    check_recipe(recipe)  # the first look at a base builds it
    start = time.process_time()
    report = check_recipe(recipe)
    assert time.process_time() - start < MOST_SECONDS
    assert all(one.file == str(recipe) for one in report.findings)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=400))
def test_any_bytes_are_a_finding_or_left_alone(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = tmp_path_factory.getbasetemp() / "bytes.yaml"
    recipe.write_bytes(data)
    report = check_recipe(recipe)
    assert report.findings or "left alone" in report.subject


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        check_recipe(tmp_path)


def base_beside(folder: Path, **fields: object) -> Path | None:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    return Tree(folder).base("base")


def test_a_base_beside_a_recipe_that_would_take_long_to_build_is_none(tmp_path: Path) -> None:
    assert base_beside(tmp_path, num_hidden_layers=94, num_experts=512, block_size=2**20) is not None
    assert base_beside(tmp_path, num_hidden_layers=200_000) is None
    assert base_beside(tmp_path, text_config={"num_hidden_layers": 1000, "n_routed_experts": 1000}) is None
    assert base_beside(tmp_path, vision_config={"depths": [1] * 200_000}) is None
    assert Tree(tmp_path).base("../elsewhere") is None


def test_of_thousands_of_unknown_keys_the_first_are_looked_up(tmp_path: Path) -> None:
    keys = "".join(f"lora_k{n}: 1\n" for n in range(5000))
    recipe = tmp_path / "many.yaml"
    recipe.write_text(f"adapter: lora\nbase_model: x/y\nlora_r: 8\nlora_alpha: 16\n{keys}")
    facts = recipe_facts(recipe)
    assert len(facts.unknown) == MOST_UNKNOWN == 60
    report = check_recipe(recipe)
    assert len(report.findings) < MOST_UNKNOWN
    assert any(f.observed.endswith("and there are more like this") for f in report.findings)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_nothing_is_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        facts = recipe_facts(path)
        assert facts.flaw is not None
        assert (facts.flaw.kind, facts.flaw.line) == ("unreadable", 1)
        assert "Errno" not in facts.flaw.message


def test_a_file_that_may_be_no_yaml_is_a_recipe_by_its_words(tmp_path: Path) -> None:
    for text, likely in (("a: [\nlora_r: 8", True), ("adapter: qlora", True), ("explora_r: 8", False)):
        (tmp_path / "a.json").write_text(text)
        assert is_likely(tmp_path / "a.json") is likely
    assert not is_likely(tmp_path)
