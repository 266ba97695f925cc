"""``--lora-gpu-report``: in the terminal, in GitHub's job summary and in JUnit XML."""

from __future__ import annotations

import re

import pytest

from tests.plugin.sessions import MODES, run, session
from tests.plugin.simulated import CARD, machine, shared
from tests.plugin.test_gpu_memory import measured, section

TESTS = """
import pytest
from pytest_lora.plugin.gpu.run import PREDICTION, Prediction

@pytest.mark.lora_vram_limit("8GiB")
def test_a(card, request):
    request.node.stash[PREDICTION] = Prediction(3 * 2**29)
    card.take(2**30)

@pytest.mark.lora_gpu
@pytest.mark.parametrize("text", ["a|b"])
def test_b(card, text):
    card.kept = card.take(2**20)
    assert 0

@pytest.mark.lora_gpu(min_vram_gb=40)
def test_c(): ...

@pytest.mark.lora_gpu(min_vram_gb=40)
def test_d(): ...

def test_plain(): ...
"""


IN_MARKDOWN = [
    "### GPU tests",
    "",
    "| test | devices | peak | limit | predicted | seconds |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
    "| `test_it.py::test_a` | cuda:0 | 1.0 GiB | 8.0 GiB | 1.5 GiB | S |",
    r"| `test_it.py::test_b[a\|b]` | cuda:0 | 1.0 MiB | - | - | S |",
    "",
    "- skipped: needs 40 GB on one device; cuda:0 has 24 GB",
    "  - `test_it.py::test_c`",
    "  - `test_it.py::test_d`",
    r"- test_it.py::test_b\[a\|b\] left 1.0 MiB (1048576 bytes) allocated on cuda:0",
    "",
]


def without_seconds(lines: list[str]) -> list[str]:
    return [re.sub(r"\d\.\d\d( \|)?$", r"S\1", line) for line in lines]


@MODES
def test_every_gpu_test_is_listed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    machine(monkeypatch, 24)
    shared(monkeypatch, pytester.path)
    summary = pytester.path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    pytester.makeconftest(CARD)
    pytester.makepyfile(test_it=TESTS)
    result = session(pytester, mode, "--lora-gpu-report", "--junit-xml=out.xml")
    result.assert_outcomes(passed=2, failed=1, skipped=2)
    assert without_seconds(section(result.outlines, "GPU tests")) == [
        "test                     devices     peak    limit  predicted  seconds",
        "test_it.py::test_a       cuda:0   1.0 GiB  8.0 GiB    1.5 GiB     S",
        "test_it.py::test_b[a|b]  cuda:0   1.0 MiB        -          -     S",
        "skipped: needs 40 GB on one device; cuda:0 has 24 GB",
        "  test_it.py::test_c",
        "  test_it.py::test_d",
        "test_it.py::test_b[a|b] left 1.0 MiB (1048576 bytes) allocated on cuda:0",
    ]
    assert without_seconds(summary.read_text().splitlines()) == ["before", *IN_MARKDOWN]
    told = measured(pytester)
    assert told["test_c"]["skipped"] == "needs 40 GB on one device; cuda:0 has 24 GB"
    assert told["test_c"]["devices"] == []
    assert (told["test_a"]["peak_bytes"], told["test_a"]["predicted_bytes"]) == (2**30, 3 * 2**29)
    assert told["test_a"]["seconds"] >= 0
    assert "test_plain" not in told


JUDGES = """
def test_judges():
    from pytest_lora.assertions import demand
    from pytest_lora.findings import Report
    demand(Report("model", ()))
"""


def test_the_job_summary_has_one_writer_and_says_nothing_twice(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    pytester.makeconftest(CARD)
    pytester.makepyfile(test_it=TESTS + JUDGES)
    run(pytester, "--lora-gpu-report", "--lora-report=out.md")
    lines = without_seconds((pytester.path / "summary.md").read_text().splitlines())
    assert sum(line.startswith("## LoRA report: ") for line in lines) == 1
    begin = lines.index("### GPU tests")
    assert lines[begin : begin + len(IN_MARKDOWN)] == IN_MARKDOWN
    assert sum("test_a`" in line for line in lines) == 1
    folded = without_seconds((pytester.path / "out.md").read_text().splitlines())
    assert (
        folded[folded.index("<details><summary>GPU tests</summary>") + 1 :][: len(IN_MARKDOWN) - 1]
        == (IN_MARKDOWN[1:])
    )


def test_nothing_is_written_without_being_asked(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    pytester.makeconftest(CARD)
    pytester.makepyfile(test_it=TESTS)
    result = run(pytester, "-k", "test_a or test_c")
    result.stdout.no_fnmatch_line("*= GPU tests =*")
    assert not (pytester.path / "summary.md").exists()


def test_of_several_tries_the_last_one_counts(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    pytester.makeconftest(
        CARD
        + """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        item._initrequest()
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            item.ihook.pytest_runtest_logreport(report=report)
    return True
"""
    )
    pytester.makepyfile(
        test_it="""
        import pytest

        TRIES = []

        @pytest.mark.lora_gpu
        def test_it(card):
            TRIES.append(1)
            block = card.take(2**30 // len(TRIES))
            assert len(TRIES) == 2
        """
    )
    result = run(pytester, "--lora-gpu-report")
    assert without_seconds(section(result.outlines, "GPU tests")) == [
        "test                 devices       peak  limit  predicted  seconds",
        "test_it.py::test_it  cuda:0   512.0 MiB      -          -     S",
    ]
