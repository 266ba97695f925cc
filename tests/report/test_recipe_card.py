"""The card of a recipe: what it holds, and how a page and Markdown show it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pytest_lora import Report, check_recipe
from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.findings import Finding
from pytest_lora.report.markdown import markdown_report
from pytest_lora.report.page import page
from pytest_lora.report.session import Session
from tests.plugin.test_recipe_items import RECIPE as TEXT
from tests.report.sample import MAP, RECIPE, SESSION, ran

FOUND = Finding("LORA610", "quantization_does_not_happen", "error", "qlora.yaml:9", "a", "b", "c", line=9)


def session(card: RecipeCard = RECIPE) -> Session:
    tests = (
        ran("configs/qlora.yaml::recipe", "failed", Report("recipe", (FOUND,), (card,))),
        ran("tests/test_map.py::test_reach", "passed", Report("model", (), (MAP,))),
    )
    return dataclasses.replace(SESSION, tests=tests)


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.replace("<wbr>", "")))


def test_a_page_shows_the_setting_the_steps_the_memory_and_the_findings() -> None:
    html = page(session())
    card = html[html.index('id="recipe-1"') :].partition("</figure>")[0]
    words = text_of(card)
    assert "qlora.yaml for Axolotl in configs/qlora.yaml::recipe" in words
    assert "30.0 GiB of 24.0 GiB on each of 8 GPUs: does not fit" in words
    assert "LORA610 quantization does not happen line 9" in words
    assert "sequences a step 64 (2 x 4 accumulated x 8 GPUs) epochs 3" in words
    assert "quantization - line 9 asked for load_in_4bit: true: only under adapter: qlora" in words
    assert 'href="#recipes"' in html
    assert 'style="width:100.0%"' in card
    assert 'style="left:80.0%"' in card


def test_the_head_of_a_map_says_which_test_it_is_of() -> None:
    head = page(session()).partition('id="map-1"')[2].partition("</figcaption>")[0]
    assert "in tests/test_map.py::test_reach" in text_of(head)
    shown = markdown_report(session())
    assert shown.index("### Adapter default") < shown.index("in `tests/test_map.py::test_reach`")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fits": True, "budget": 80 * 2**30, "gpus": 1}, "30.0 GiB of 80.0 GiB: fits"),
        ({"fits": None, "budget": None}, "30.0 GiB"),
        (
            {"fits": None, "note": "the weights alone"},
            "30.0 GiB of 24.0 GiB on each of 8 GPUs (the weights alone)",
        ),
    ],
)
def test_what_is_known_of_the_memory_is_said_and_no_more(changes: dict[str, object], words: str) -> None:
    html = page(session(dataclasses.replace(RECIPE, **changes)))
    card = html[html.index('id="recipe-1"') :].partition("</figcaption>")[0]
    numbers = text_of(card.partition('class="numbers"')[2].partition("</p>")[0].partition(">")[2])
    assert re.sub(r" (?=[:)])|(?<=\() ", "", numbers).strip() == words


def test_markdown_shows_it_too() -> None:
    shown = markdown_report(session())
    assert "### qlora.yaml for Axolotl" in shown
    assert "30.0 GiB of 24.0 GiB: does not fit" in shown
    assert "| `quantization` | - | line 9; asked for load_in_4bit: true: only under adapter: qlora |" in shown


@pytest.mark.lora_slow
def test_a_recipe_on_a_card_has_its_card(tmp_path: Path) -> None:
    (tmp_path / "qlora.yaml").write_text(TEXT + "max_steps: 1000\nwarmup_steps: 30\n")
    (card,) = check_recipe(tmp_path / "qlora.yaml", budget="24GiB").figures
    assert isinstance(card, RecipeCard)
    assert (card.title, card.tool, card.fits, card.note) == ("qlora.yaml", "Axolotl", True, "")
    assert card.peak is not None
    assert 2**30 < card.peak < 24 * 2**30
    assert card.budget == 24 * 2**30
    assert dict(card.steps) == {
        "sequences a step": "1 (1 x 1 accumulated)",
        "tokens a step, at most": "512",
        "optimizer steps": "1,000",
        "warm-up": "30 steps",
    }
    rows = {row.name: row for row in card.rows}
    assert (rows["r"].value, rows["r"].source) == ("16", "line 3")
    tight = check_recipe(tmp_path / "qlora.yaml", budget="1GiB")
    assert tight.figures[0].fits is False
    assert not tight.ok
    again = Report.from_json(tight.to_json())
    assert again == tight
    assert json.loads(tight.to_json())["figures"][0]["kind"] == "recipe"


def test_a_step_divided_among_cards_is_that_of_the_fullest(tmp_path: Path) -> None:
    (tmp_path / "z3.yaml").write_text(TEXT + "deepspeed: z3.json\n")
    (tmp_path / "z3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (card,) = check_recipe(tmp_path / "z3.yaml", budget="24GiB", gpus=2).figures
    assert isinstance(card, RecipeCard)
    assert (card.fits, card.note, card.gpus) == (True, "", 2)
