"""What the HTML report costs with 2,000 findings, and the picture of a report that the README shows.

    python -m benchmarks.report_page [--json benchmarks/results/report_page.json] [--picture docs/images/report.png]

Needs chromium with its driver and the extra ``browser``. The page is rendered and opened a few times and medians are
taken; for the picture, a session of tests is really run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from pytest_lora.report.page import page
from tests.report import browser
from tests.report.sample import SESSION
from tests.report.test_page import many

FINDINGS = 2000
BUDGET_BYTES = 2_000_000

TESTS = '''
import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora import assert_fits_memory, assert_lora_healthy, assert_loss_decreases

STEP = {"batch_size": 4, "seq_len": 2048, "quantization": "nf4"}


@pytest.fixture
def bypassed(lora_model):
    """Two layers in which a faster attention passes the adapter by."""
    layers = lora_model.base_model.model.model.layers
    for layer in (layers[1], layers[3]):
        layer.self_attn.v_proj.forward = layer.self_attn.v_proj.base_layer.forward
    yield lora_model
    for layer in (layers[1], layers[3]):
        del layer.self_attn.v_proj.forward


def test_every_module_trains(bypassed, lora_batch):
    assert_lora_healthy(bypassed, batches=lora_batch)


def test_loss_falls(lora_model, lora_batch):
    assert_loss_decreases(lora_model, lora_batch)


@pytest.mark.parametrize("budget", ["24GiB", "80GiB"])
def test_step_fits(budget):
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    assert_fits_memory(LlamaConfig(), config, budget=budget, **STEP)
'''


def measured(rounds: int) -> dict[str, Any]:
    session = many(FINDINGS)
    page(SESSION)  # templates are compiled and rules loaded once
    rendering: list[float] = []
    opening: list[float] = []
    with TemporaryDirectory() as folder, browser.chromium() as driver:
        file = Path(folder) / "report.html"
        for _ in range(rounds):
            start = time.perf_counter()
            html = page(session)
            rendering.append(time.perf_counter() - start)
            file.write_text(html)
            driver.get(file.as_uri())
            times = "const [one] = performance.getEntriesByType('navigation'); return one.loadEventEnd"
            opening.append(driver.execute_script(times) / 1000)
    return {
        "findings": FINDINGS,
        "bytes": len(html.encode()),
        "bytes_budget": BUDGET_BYTES,
        "render_seconds": statistics.median(rendering),
        "open_seconds": statistics.median(opening),
        "rounds": rounds,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jinja2", "pytest")},
    }


def take_picture(picture: Path) -> None:
    """Run the tests above and photograph their report: the findings folded, and what there is to look at below."""
    with TemporaryDirectory() as folder:
        home = Path(folder) / "support-bot"
        home.mkdir()
        (home / "test_adapter.py").write_text(TESTS)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "--rootdir",
                home,
                "--lora-report=report.html",
                "test_adapter.py",
            ],
            cwd=home,
            check=False,
        )
        with browser.chromium() as driver:
            browser.emulate(driver, width=920)
            driver.get((home / "report.html").as_uri())
            driver.execute_script(
                "for (const rule of document.querySelectorAll('details.rule')) rule.open = false;"
                "for (const nav of document.querySelectorAll('nav')) nav.style.position = 'static'"
            )
            end = driver.execute_script(
                "return document.querySelector('#memory .card').getBoundingClientRect().bottom + scrollY + 10"
            )
            picture.parent.mkdir(parents=True, exist_ok=True)
            browser.photograph(driver, picture, width=920, height=round(end))
    # A page has few colours, and with a palette a quarter of the bytes.
    Image.open(picture).convert("RGB").quantize(
        256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    ).save(picture, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result to this file")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="also take the picture")
    options = parser.parse_args()
    result = measured(options.rounds)
    print(
        f"{result['findings']} findings: {result['bytes']:,} bytes, rendered in {result['render_seconds']:.2f} s, "
        f"opened in {result['open_seconds']:.2f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.picture:
        take_picture(options.picture)
    return 0 if result["bytes"] < BUDGET_BYTES else 1


if __name__ == "__main__":
    raise SystemExit(main())
