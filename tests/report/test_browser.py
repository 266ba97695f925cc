"""The page in a real browser: it renders, folds and sorts, by mouse and by keyboard, and anybody can read it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.report.page import page
from tests.report import browser
from tests.report.sample import SESSION, worded
from tests.report.test_page import HOSTILE

if lacking := browser.missing():
    pytest.skip(f"no browser to test with: {lacking}", allow_module_level=True)

from axe_core_python.selenium import Axe
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

pytestmark = pytest.mark.lora_slow


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    with browser.chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    sessions = {
        "sample": SESSION,
        "crashed": dataclasses.replace(
            SESSION, state="crashed", problem="OSError: disk is gone", collected=90
        ),
        "hostile": worded("".join(text for text in HOSTILE) + "x" * 300),
    }
    made = {}
    for name, session in sessions.items():
        file = folder / f"{name}.html"
        file.write_text(page(session))
        made[name] = file.as_uri()
    return made


@pytest.fixture
def opened(request: pytest.FixtureRequest, driver: Chrome, pages: dict[str, str]) -> Chrome:
    """The page that the test has as parameter, or the sample, freshly opened; what earlier pages said is forgotten."""
    browser.emulate(driver)
    driver.get_log("browser")
    driver.get(pages[getattr(request, "param", "sample")])
    return driver


def find(driver: Chrome, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def column(driver: Chrome, section: str, number: int) -> list[str]:
    cells = driver.find_elements(By.CSS_SELECTOR, f"#{section} tbody tr > :nth-child({number})")
    return [cell.text for cell in cells]


def unfold(driver: Chrome) -> None:
    driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")


def complaints(driver: Chrome) -> list[Any]:
    return [entry["message"] for entry in driver.get_log("browser")]


@pytest.mark.parametrize("opened", ["sample", "crashed", "hostile"], indirect=True)
def test_pages_open_in_silence_ask_for_nothing_and_fit_the_window(opened: Chrome) -> None:
    unfold(opened)
    for width in (320, 375, 1180):
        browser.emulate(opened, width=width)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    assert complaints(opened) == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.execute_script("return document.querySelectorAll('img, iframe, object').length") == 0
    assert find(opened, "footer").is_displayed()


def test_rules_fold_by_mouse_and_keyboard(opened: Chrome) -> None:
    rule, summary = find(opened, "#LORA203"), find(opened, "#LORA203 > summary")
    assert rule.get_property("open") is True
    summary.click()
    assert rule.get_property("open") is False
    assert not find(opened, "#LORA203 .finding").is_displayed()
    summary.send_keys(Keys.ENTER)
    assert rule.get_property("open") is True
    is_open = "return [...document.querySelectorAll('details.rule')].map(one => one.open)"
    close, unfold_all = find(opened, "[data-fold=close]"), find(opened, "[data-fold=open]")
    close.send_keys(Keys.SPACE)
    assert opened.execute_script(is_open) == [False] * 4
    unfold_all.click()
    assert opened.execute_script(is_open) == [True] * 4
    close.click()
    find(opened, "#tests tbody a[href='#LORA127']").click()
    assert opened.execute_script(is_open) == [False, False, True, False]


def test_tables_sort_by_mouse_and_keyboard(opened: Chrome) -> None:
    assert column(opened, "tests", 1)[0] == "error"
    time = find(opened, "#tests th:nth-child(5) button")
    time.click()
    rising = column(opened, "tests", 5)
    assert (rising[0], rising[-1]) == ("0.40 s", "11.0 s")
    head = find(opened, "#tests th:nth-child(5)")
    assert head.get_attribute("aria-sort") == "ascending"
    time.send_keys(Keys.ENTER)
    assert column(opened, "tests", 5) == rising[::-1] or column(opened, "tests", 5)[:2] == [
        "11.0 s",
        "2.50 s",
    ]
    assert head.get_attribute("aria-sort") == "descending"
    find(opened, "#tests th:nth-child(2) button").send_keys(Keys.SPACE)
    names = column(opened, "tests", 2)
    assert names == sorted(names)
    assert head.get_attribute("aria-sort") == "none"
    find(opened, "#gpu th:nth-child(3) button").click()
    assert column(opened, "gpu", 1) == ["tests/test_gpu.py::test_large", "tests/test_gpu.py::test_step"]


def test_the_map_is_read_and_coloured_by_mouse_and_keyboard(opened: Chrome) -> None:
    cells, readout = find(opened, "#map-1 .scroll[data-stack]"), find(opened, "#map-1 .readout")
    cells.send_keys(Keys.ARROW_RIGHT)
    assert (
        readout.text
        == "model.layers.0.self_attn.q_proj · frozen · rank 32 · scaling 2 · gradient 0.03 · update 0.001"
    )
    cells.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert readout.text.startswith(
        "model.layers.3.self_attn.v_proj · dead · rank 32 · scaling 2 · gradient 0 "
    )
    one, other = opened.find_elements(By.CSS_SELECTOR, "#map-1 .grid i:not([class])")[0:14:13]
    ActionChains(opened).move_to_element(one).perform()
    assert readout.text.startswith("model.layers.2.self_attn.q_proj · trains")

    def colour(cell: Any) -> str:
        return str(cell.value_of_css_property("background-color"))

    assert colour(one) != colour(other)
    find(opened, "#map-1 input:checked").send_keys(Keys.ARROW_LEFT)
    assert find(opened, "#map-1 input:checked + span").text == "Scaling"
    assert colour(one) == colour(other)
    assert "2 everywhere" in find(opened, "#map-1 .legend").text


def test_states_are_told_apart_without_colour(opened: Chrome) -> None:
    drawn = {
        state: tuple(
            find(opened, f"#map-1 .grid i.{state}").value_of_css_property(name)
            for name in ("background-image", "border-style")
        )
        for state in ("dead", "missing", "frozen", "idle")
    }
    plain = find(opened, "#map-1 .grid i:not([class])").value_of_css_property("background-image")
    assert plain == "none"
    assert len(set(drawn.values())) == 4
    assert drawn["missing"][1] == "dashed"
    assert all("gradient" in drawn[state][0] for state in ("dead", "frozen", "idle"))


@pytest.mark.parametrize(
    ("opened", "scheme"), [("sample", "light"), ("crashed", "dark")], indirect=["opened"]
)
def test_axe_finds_nothing_wrong(opened: Chrome, scheme: str) -> None:
    browser.emulate(opened, scheme=scheme)
    unfold(opened)
    opened.execute_script(Axe().axe_script)
    quickly = {"preload": False, "selectors": False, "ancestry": False, "xpath": False}
    passed, failed = opened.execute_async_script(AUDIT, quickly)
    assert failed == [] or opened.execute_async_script(AUDIT, {}) == []  # the second says where
    assert {"color-contrast", "landmark-one-main", "region"} <= set(passed)


AUDIT = """
const [options, done] = arguments;
axe.run(document, options).then((result) => done([
    result.passes.map((one) => one.id),
    result.violations.flatMap((one) => one.nodes.map((node) => `${one.id}: ${node.html} ${node.failureSummary}`)),
]));
"""


def test_the_keyboard_reaches_the_findings_first(opened: Chrome) -> None:
    find(opened, "body").send_keys(Keys.TAB)
    skip = opened.switch_to.active_element
    assert (skip.text, skip.is_displayed()) == ("Skip to the findings", True)
    skip.send_keys(Keys.ENTER)
    assert opened.switch_to.active_element.get_attribute("id") == "main"


def test_a_print_has_everything_unfolded_and_nothing_to_click(opened: Chrome) -> None:
    find(opened, "[data-fold=close]").click()
    opened.execute_script(
        "addEventListener('beforeprint', () => { window.printed = document.querySelectorAll('.rule[open]').length })"
    )
    printed = opened.execute_cdp_cmd("Page.printToPDF", {})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    assert opened.execute_script("return window.printed") == 4
    assert opened.execute_script("return document.querySelectorAll('.rule[open]').length") == 0
    browser.emulate(opened, media="print", scheme="dark")
    assert not any(find(opened, one).is_displayed() for one in ("nav", ".tools", ".planes"))
    assert find(opened, "body").value_of_css_property("background-color") == "rgba(255, 255, 255, 1)"


def test_photographs_are_whole(opened: Chrome, tmp_path: Path) -> None:
    browser.photograph(opened, tmp_path / "page.png", width=1180, height=400)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
