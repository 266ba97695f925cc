"""Folders and recipes under names, and with words in them, that mean something to terminals, pytest and CI services."""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.bases.examples import folders
from pytest_lora.values import file_id
from tests.namespace import Namespace
from tests.plugin.sessions import MODES, session
from tests.test_cleaning import is_harmless

FOLDERS = (
    *(
        "a::b",
        "::add-mask::x",
        "we[ird]",
        "[",
        "esc\x1b[31m",
        "line\n::error::x",
        "bidi\u202e",
        "##[add-mask]y",
    ),
    *(os.fsdecode(b"byte\xff"), "back\\slash", "per%20cent", ":", "tab\t"),
)
TEXT = "\x1b[31mred\x1b]0;t\x07\n::add-mask::z\r\n\u202e##[add-mask]q \ud800"


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter under each name, whose texts are no better; and recipes."""
    scratch = tmp_path_factory.mktemp("strangers")
    sound = Namespace(tmp_path_factory.mktemp("made")).adapter()
    for number, name in enumerate(FOLDERS):
        folder = scratch / "adapters" / name
        shutil.copytree(sound, folder)
        if number % 2:
            folders.configure(folder, peft_type=TEXT, target_modules=[TEXT], **{TEXT: TEXT})
            folders.edit(
                folder, lambda t: {f"{key}{TEXT[:-2]}" if "lora_B" in key else key: v for key, v in t.items()}
            )
        else:
            folders.configure(folder, base_model_name_or_path=TEXT, r=16)
        (folder / f"{file_id(name)[:20]}\x1b[1m\n::notice::n").touch()
    recipes = scratch / "recipes"
    recipes.mkdir()
    for name in ("a::b.yaml", "esc\x1b[31m\n::error::x.yml"):
        (recipes / name).write_text(
            "adapter: lora\nbase_model: ::add-mask::x\n::add-mask::a: 1\nlora_r: 16\nlora_alpha: 16\n"
            '"##[add-mask]k\\e[31m": "\\u202e"\nlora_target_modules: ["\\e[1m"]\nlora_r: 16\n'
        )
    return scratch


@MODES
def test_they_are_judged_and_nothing_of_them_gets_out_raw(
    strangers: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    shutil.copytree(strangers, pytester.path, dirs_exist_ok=True)
    files = [pytester.path / f"report.{kind}" for kind in ("html", "md", "json")]
    result = session(
        pytester,
        mode,
        *("-v", "-rA", "-W", "default::pytest_lora.LoraHealthWarning"),
        *("--lora-adapters=adapters", "--lora-recipes=recipes", "--junitxml=junit.xml"),
        *(f"--lora-report={file}" for file in files),
    )
    assert result.parseoutcomes().get("errors", 0) == 0, result.stdout.str()
    text = result.stdout.str() + result.stderr.str()
    allowed = [line for line in text.split("\n") if line.startswith(("::error file=", "::warning file="))]
    others = [line for line in text.split("\n") if line not in allowed]
    raw = [line for line in others if not is_harmless(line)]
    assert allowed
    assert raw == []
    assert all(line.isprintable() for line in allowed)
    cases = ET.parse(pytester.path / "junit.xml").getroot().iter("testcase")
    named = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    for name in FOLDERS:
        assert any(file_id(name).replace("/", ".") in one for one in named), name
    judged = [case for case in named if "adapters" in case]
    assert len(set(judged)) == len(judged) >= 5 * len(FOLDERS)
    for file in (*files, pytester.path / "summary.md", pytester.path / "junit.xml"):
        written = file.read_text()
        assert all(c.isprintable() or c in "\n\t" for c in written), file
        assert "\n::add-mask" not in written


def test_ids_of_strangers_are_those_of_their_folders(strangers: Path, pytester: pytest.Pytester) -> None:
    shutil.copytree(strangers / "adapters", pytester.path / "adapters")
    result = session(pytester, "plain", "--collect-only", "-q", "--lora-adapters=adapters")
    ids = {line.partition("::")[0] for line in result.outlines if line.endswith("::values")}
    assert ids == {f"adapters/{file_id(name)}/adapter_config.json" for name in FOLDERS}


def test_the_setting_of_a_stranger_is_shown_without_a_raw_character(
    strangers: Path, pytester: pytest.Pytester
) -> None:
    for recipe in (strangers / "recipes").iterdir():
        result = session(pytester, "plain", f"--lora-show-recipe={recipe}")
        assert "a recipe of Axolotl" in result.stdout.str()
        assert is_harmless(result.stdout.str())


def test_folders_that_may_not_be_entered_do_not_stop_the_session(
    strangers: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system answers as it does to a user without rights: root has them all."""
    shutil.copytree(strangers / "adapters" / "a::b", pytester.path / "adapters" / "closed")
    shutil.copytree(strangers / "recipes", pytester.path / "recipes")
    stat = os.stat

    def refused(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, (str, os.PathLike)) and Path(path).parent.name in ("closed", "recipes"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refused)
    result = pytester.inline_run(
        "--lora-adapters=adapters", "--lora-recipes=recipes", "-p", "no:cacheprovider"
    )
    monkeypatch.undo()
    assert result.ret in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    assert len(result.getreports("pytest_runtest_logreport")) > 4
