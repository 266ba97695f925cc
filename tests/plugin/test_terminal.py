"""What a session shows: of many subjects, quiet, verbose, in colour, and of files that are no text."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from pytest_lora.assertions import delivered
from pytest_lora.findings import Finding, LoraHealthWarning, Report
from pytest_lora.plugin.file_nodes import deliver, wrapped
from pytest_lora.plugin.summary import cut, left_lines, rule_lines, subject_lines
from tests.plugin.sessions import run, session
from tests.plugin.test_command_line import RECIPE

LONG = Finding(
    "LORA431",
    "rank_of_the_saved_tensors_differs_from_what_the_configuration_says",
    "error",
    "40 modules: " + "model.layers.*.self_attn.q_proj, " * 5,
    "what was seen " * 12,
    "what was expected",
    "call `model.merge_and_unload(adapter_names=['default', 'other'], safe_merge=True)` and save it again",
)


def many(number: int) -> dict[str, list[Report]]:
    """So many adapters, of which every tenth has an error and every tenth a warning."""
    warning = Finding("LORA127", "scaling_differs", "warning", "a", "b", "c", "d")
    kinds = {3: (LONG,), 4: (warning,)}
    left = (("no base given", "11 config rules"),)
    return {
        f"adapters/{n}/adapter_config.json::keys": [
            Report(f"adapter {'of-a-very-long-name-' * 4}{n}", kinds.get(n % 10, ()), not_judged=left)
        ]
        for n in range(number)
    }


def test_thirty_subjects_are_readable_at_80_columns() -> None:
    judged = many(30)
    lines = list(subject_lines(judged.values()))
    assert lines[0] == "30 subjects in 30 tests: 24 healthy, 3 with errors, 3 with warnings"
    assert len(lines) == 7
    assert all("healthy in 0 of 1 test" in line for line in lines[1:])
    found = {nodeid: list(reports[0].findings) for nodeid, reports in judged.items()}
    rules = [line for _, line in rule_lines(found)]
    assert rules[0].endswith("  3 findings in 3 tests")
    wide = [*lines, *rules, *wrapped(str(LONG), 80), *left_lines(judged)]
    assert [line for line in wide if len(line) > 80 and "`" not in line] == []
    assert LONG.fix.partition("`")[2].partition("`")[0] in "\n".join(wrapped(str(LONG), 80))
    assert list(left_lines(judged)) == ["not judged: 11 config rules (no base given)"]
    assert next(subject_lines(many(5).values())).endswith("0: healthy in 1 of 1 test")
    assert list(subject_lines(many(300).values()))[-1] == "... and 40 more subjects with findings"


def test_a_text_is_cut_in_its_middle() -> None:
    assert cut("short", 5) == "short"
    assert cut("0123456789" * 3, 12) == "012345...789"
    assert len(cut("x" * 500, 40)) == 40


@pytest.fixture
def recipes(pytester: pytest.Pytester) -> Path:
    folder = pytester.mkdir("configs")
    for n in range(21):
        (folder / f"{n:02}.yaml").write_text(RECIPE + ("gradient_checkpoint: true\n" if n == 20 else ""))
    (folder / "asks.yml").write_text(RECIPE + "load_in_4bit: true\n")
    return folder


def health(result: pytest.RunResult) -> list[str]:
    lines = result.outlines
    start = next((n for n, line in enumerate(lines) if " LoRA health " in line), len(lines))
    end = next((n for n, line in enumerate(lines) if n > start and line.startswith("=")), None)
    return lines[start + 1 : end]


def test_quiet_plain_and_verbose(recipes: Path, pytester: pytest.Pytester) -> None:
    plain = run(pytester, "--lora-recipes=configs")
    assert "recipes: 10 of 22 files" in plain.outlines
    assert "recipes: 20 of 22 files" in plain.outlines
    lines = health(plain)
    assert lines[0] == "22 subjects in 22 tests: 20 healthy, 1 with errors, 1 with warnings"
    assert re.search(
        r" not judged: \d+ config rules \(base not known; base=, --lora-base or ini lora_bases names one\); "
        r"\d+ memory rules \(no card given\) ",
        " ".join(" ".join(lines).split()),
    )
    assert [line[:7] for line in lines[-2:]] == ["LORA610", "LORA603"]
    quiet = run(pytester, "--lora-recipes=configs", "-q")
    assert health(quiet) == lines[-2:]
    assert not any(line.startswith("recipes: ") for line in quiet.outlines)
    assert health(run(pytester, "--lora-recipes=configs", "-qq")) == []


@pytest.mark.parametrize("mode", ["plain", pytest.param("xdist", marks=pytest.mark.lora_slow)])
def test_very_verbose_shows_the_effective_setting_numbers_and_seconds(
    recipes: Path, pytester: pytest.Pytester, mode: str
) -> None:
    lines = health(session(pytester, mode, "--lora-recipes=configs/asks.yml", "-vv"))
    assert any("asks.yml" in line and " s in 1 test" in line for line in lines)
    assert any(line.split() == ["r", "16", "line", "3"] for line in lines)
    assert "  sequences a step: 1 (1 x 1 accumulated)" in lines
    assert any("asked for load_in_4bit: true" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_numbers_of_a_check_are_counted_where_asked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        from pytest_lora.assertions import demand
        from pytest_lora.findings import Report

        def test_counts():
            demand(Report("model", measured=(("trainable parameters with default", 4194304), ("scaling", 2.0))))
        """
    )
    assert health(run(pytester, "-vv"))[-2:] == [
        "  trainable parameters with default: 4,194,304",
        "  scaling: 2",
    ]
    assert health(run(pytester))[-1:] == ["model: healthy in 1 of 1 test"]


@pytest.mark.parametrize("colour", ["yes", "no"])
def test_colours_follow_the_switch_of_pytest(recipes: Path, pytester: pytest.Pytester, colour: str) -> None:
    result = run(pytester, "--lora-recipes=configs/asks.yml", f"--color={colour}")
    (line,) = (line for line in result.outlines if "LORA610 error" in line)
    assert line.startswith("\x1b[31m") == (colour == "yes")
    assert ("\x1b" in result.stdout.str()) == (colour == "yes")


def test_lines_of_recipes_under_a_warning_are_cut(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"a: 1\nlora_r: 8  # {'long ' * 100}\nb: 2\n")
    assert shown_under(recipe, 2).startswith("lora_r: 8  # long")
    assert len(shown_under(recipe, 2)) < 120
    assert shown_under(recipe, 3) == "b: 2"


def shown_under(file: Path, line: int | None) -> str:
    """The line of a file that pytest prints under a warning of a finding there."""
    finding = Finding("LORA127", "scaling_differs", "warning", "a", "b", "c", "d", line=line)
    with pytest.warns(LoraHealthWarning) as told:
        deliver(Report("adapter", (finding,)), str(file))
    delivered.clear()
    (one,) = told
    text = warnings.formatwarning(one.message, one.category, one.filename, one.lineno, one.line)
    return text.partition("fix:      d")[2].strip()
