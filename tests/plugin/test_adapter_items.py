"""Saved adapters as test items, as users run them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from pytest_lora import check_checkpoint
from pytest_lora.bases.examples import folders
from pytest_lora.rules import catalogue
from pytest_lora.rules.checkpoint import GROUPS, group_of
from tests.forked import run_forked
from tests.namespace import Namespace
from tests.plugin.sessions import MODES, run, session

PLAIN = ("-p", "no:cacheprovider", "-p", "no:xdist")
EVIL_INI = "[pytest]\naddopts = -p modeling\npythonpath = .\n"
EVIL = "open(__file__ + '.EXECUTED', 'w')\n\ndef test_evil(): ...\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters: a sound one, one with another rank in its configuration, one of zeros."""
    scratch = tmp_path_factory.mktemp("saved")
    names = Namespace(tmp_path_factory.mktemp("made"))
    for name in ("sound", "rank", "zeros"):
        shutil.move(names.adapter(), scratch / name)
    folders.configure(scratch / "rank", r=16)
    folders.edit(scratch / "zeros", lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    return scratch


@pytest.fixture
def adapters(saved: Path, pytester: pytest.Pytester) -> Path:
    target = pytester.path / "adapters"
    shutil.copytree(saved, target)
    return target


UNSERVED = ["files", "config", "keys", "shapes", "values", "base"]


def ids(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "::" in line]


def test_every_rule_on_checkpoints_belongs_to_one_item() -> None:
    for rule in catalogue():
        if rule.stage == "checkpoint" or rule.on_saved:
            named = [name for name, starts in GROUPS.items() if rule.code.startswith(starts)]
            assert [group_of(rule.code)] == (named or ["config"]), rule.code


def test_each_adapter_is_an_item_for_each_group(adapters: Path, pytester: pytest.Pytester) -> None:
    result = run(pytester, "--collect-only", "-q", "--lora-adapters", "adapters")
    assert ids(result) == [
        f"adapters/{name}/adapter_config.json::{group}"
        for name in ("rank", "sound", "zeros")
        for group in UNSERVED
    ]
    assert list(GROUPS) == [*UNSERVED, "serving"]


@MODES
def test_failures_show_the_report(adapters: Path, pytester: pytest.Pytester, mode: str) -> None:
    result = session(pytester, mode, "--lora-adapters", "adapters", workers=2)
    result.assert_outcomes(passed=16, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*_ rank: shapes _*",
            "LORA431: adapter rank: 1 error",
            "",
            "error[[]LORA431[]]: rank differs from config",
            "  --> 4 modules: model.layers.?.self_attn.q_proj,",
            "      model.layers.?.self_attn.v_proj",
            "  observed: adapter_config.json says r=16, but the tensors have rank 8 in 4 of 4",
            "            modules",
            "  expected: the rank of the tensors in r or rank_pattern",
            "  fix:      restore r=8 and the lora_alpha of the training; ranks are fixed at",
            "            initialisation",
        ]
    )
    result.stdout.fnmatch_lines(["*_ zeros: values _*", "LORA442: adapter zeros: 1 error"])
    result.stdout.fnmatch_lines(
        [
            "*= LoRA health =*",
            "adapter rank: healthy in 5 of 6 tests",
            "adapter sound: healthy in 6 of 6 tests",
            "adapter zeros: healthy in 5 of 6 tests",
            "LORA431 error   rank differs from config       1 finding in 1 test",
            "LORA442 error   saved adapter holds no update  1 finding in 1 test",
        ]
    )
    result.stdout.fnmatch_lines_random(
        [
            "FAILED adapters/rank/adapter_config.json::shapes*",
            "FAILED adapters/zeros/adapter_config.json::values*",
        ]
    )


def test_the_reference_in_the_folder_of_a_trained_adapter_passes(
    adapters: Path, pytester: pytest.Pytester
) -> None:
    for name in ("ref", "second"):
        shutil.copytree(adapters / "zeros", adapters / "sound" / name)
    result = run(pytester, "--lora-adapters", "adapters/sound")
    result.assert_outcomes(passed=17, failed=1)
    result.stdout.fnmatch_lines(["FAILED adapters/sound/second/adapter_config.json::values*"])


def test_one_adapter_is_named_on_the_command_line(adapters: Path, pytester: pytest.Pytester) -> None:
    run(pytester, "adapters/sound/adapter_config.json").assert_outcomes(passed=6)
    run(pytester, "adapters/rank/adapter_config.json::shapes").assert_outcomes(failed=1)
    run(pytester, "adapters/rank/adapter_config.json", "-k", "not shapes").assert_outcomes(
        passed=5, deselected=1
    )


def test_an_id_that_was_printed_can_be_run_again(adapters: Path, pytester: pytest.Pytester) -> None:
    named = "adapters/rank/adapter_config.json::shapes"
    for flags in (["--lora-adapters=adapters"], ["-o", "lora_adapters=adapters"], []):
        result = run(pytester, *flags, named)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines([f"FAILED {named}*"])
    (adapters / "sound/adapter_model.safetensors").rename(adapters / "sound/other")
    (adapters / "sound/adapter_config.json").rename(adapters / "sound/adapter_model.bin")
    known_by = "adapters/sound/adapter_model.bin::files"
    run(pytester, "-o", "lora_adapters=adapters", known_by).assert_outcomes(passed=1, warnings=1)
    away = pytester.mkdir("away")
    adapters.rename(away / "adapters")
    pytester.mkdir("here").joinpath("pytest.ini").write_text("[pytest]\n")
    os.chdir(pytester.path / "here")
    run(pytester, f"--lora-adapters={away / 'adapters'}", named).assert_outcomes(failed=1)


def test_a_folder_named_on_the_command_line_holds_adapters_where_it_holds_no_test(
    adapters: Path, pytester: pytest.Pytester
) -> None:
    run(pytester, "adapters").assert_outcomes(passed=16, failed=2)
    run(pytester, "adapters", "-k", "shapes").assert_outcomes(passed=2, failed=1, deselected=15)
    result = run(pytester, "--collect-only", "-q", "adapters/sound")
    assert ids(result) == [f"adapters/sound/adapter_config.json::{group}" for group in UNSERVED]
    pytester.mkdir("tests").joinpath("test_it.py").write_text("def test_plain(): ...")
    shutil.copytree(adapters / "sound", pytester.path / "tests" / "data")
    run(pytester, "tests").assert_outcomes(passed=1)
    run(pytester, "tests", "adapters").assert_outcomes(passed=17, failed=2)
    assert run(pytester, "-k", "nothing").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_name_on_the_hub_says_what_to_do(pytester: pytest.Pytester) -> None:
    for option in ("--lora-adapters", "--lora-recipes", "--lora-model"):
        result = run(pytester, f"{option}=owner/adapter")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert any("hf download owner/adapter --local-dir adapter" in line for line in result.stderr.lines)
    with pytest.raises(ValueError, match="hf download owner/adapter --local-dir adapter"):
        check_checkpoint("owner/adapter")


def test_tests_and_adapters_run_together_and_once(adapters: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_plain(): ...")
    result = run(pytester, "--lora-adapters", "adapters/sound")
    result.assert_outcomes(passed=7)
    result = run(pytester, "--lora-adapters", "adapters", ".")
    result.assert_outcomes(passed=17, failed=2)
    result = run(pytester, "--lora-adapters=adapters", "adapters")
    result.assert_outcomes(passed=16, failed=2)


def test_ini_counts_where_no_path_is_given(adapters: Path, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nlora_adapters =\n    adapters/sound\n    adapters/zeros\n")
    pytester.makepyfile("def test_plain(): ...")
    run(pytester).assert_outcomes(passed=12, failed=1)
    run(pytester, "test_ini_counts_where_no_path_is_given.py").assert_outcomes(passed=1)
    run(pytester, "--lora-adapters", "adapters/sound").assert_outcomes(passed=7)


def test_adapters_outside_the_root_keep_readable_names(
    adapters: Path, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    project = pytester.mkdir("project")
    (project / "pytest.ini").write_text("[pytest]\n")
    os.chdir(project)
    result = run(pytester, "--collect-only", "-q", f"--lora-adapters={adapters / 'sound'}")
    assert ids(result) == [f"sound/adapter_config.json::{group}" for group in UNSERVED]


def test_the_base_is_compared(adapters: Path, pytester: pytest.Pytester) -> None:
    names = Namespace(pytester.mkdir("made"))
    names["gpt2_base"].save_pretrained(pytester.path / "gpt2")
    names["base"].save_pretrained(pytester.path / "llama")
    arguments = ("--lora-adapters", "adapters/sound", "--lora-base")
    result = run(pytester, *arguments, "gpt2/config.json")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["error[[]LORA451[]]: base is foreign"])
    pytester.makeini("[pytest]\nlora_adapters = adapters/sound\nlora_base = llama\n")
    run(pytester).assert_outcomes(passed=6)
    pytester.makeini(
        "[pytest]\nlora_adapters = adapters/sound\nlora_base = org/ours\nlora_bases = org/ours = gpt2\n"
    )
    run(pytester).assert_outcomes(passed=5, failed=1)
    result = run(pytester, *arguments, "openai-community/gpt2")
    result.stdout.fnmatch_lines(["error[[]LORA451[]]: base is foreign"])


def test_warnings_can_be_made_errors(adapters: Path, pytester: pytest.Pytester) -> None:
    folders.configure(adapters / "sound", base_model_name_or_path=None)
    arguments = ("--lora-adapters", "adapters/sound")
    result = run(pytester, *arguments)
    result.assert_outcomes(passed=6, warnings=1)
    result.stdout.fnmatch_lines(["*LoraHealthWarning: warning[[]LORA452[]]: base name is missing"])
    strict = ("-W", "error::pytest_lora.LoraHealthWarning")
    run(pytester, *arguments, *strict).assert_outcomes(passed=5, failed=1)


def test_what_is_meant_comes_from_ini(adapters: Path, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nlora_config =\n    fresh = True\n")
    run(pytester, "--lora-adapters", "adapters/zeros").assert_outcomes(passed=6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--lora-adapters", "nowhere"],
            "--lora-adapters: there is no folder '{path}/nowhere'; adapters are never downloaded",
        ),
        (
            ["-o", "lora_adapters=nowhere"],
            "ini lora_adapters: there is no folder '{path}/nowhere'; adapters are never downloaded",
        ),
        (
            ["--lora-base", "nowhere"],
            "--lora-base: '{path}/nowhere' is no model folder and no config.json, and 'nowhere' is no public model "
            "that is known",
        ),
        (["-o", "lora_bases=ours"], "ini lora_bases: 'ours' is not NAME = PATH"),
        (
            ["-o", "lora_bases=ours = nowhere"],
            "ini lora_bases: '{path}/nowhere' is no model folder and no config.json",
        ),
    ],
)
def test_wrong_paths_are_usage_errors(pytester: pytest.Pytester, args: list[str], message: str) -> None:
    result = run(pytester, *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {message.format(path=pytester.path)}" in result.stderr.lines


def test_nothing_among_the_adapters_is_executed(adapters: Path, pytester: pytest.Pytester) -> None:
    for folder in (adapters, adapters / "sound"):
        for name in ("conftest.py", "__init__.py", "test_evil.py", "modeling.py"):
            (folder / name).write_text(EVIL)
        (folder / "pytest.ini").write_text(EVIL_INI)
    for result in (
        run_forked(pytester, "--lora-adapters=adapters", "-n", "1"),
        run(pytester, "--lora-adapters=adapters"),
        run(pytester, "--lora-adapters=adapters", "."),
    ):
        result.assert_outcomes(passed=16, failed=2)
    assert not list(adapters.rglob("*.EXECUTED"))


def test_an_ini_file_that_pytest_found_among_the_adapters_is_refused(
    adapters: Path, pytester: pytest.Pytester
) -> None:
    """Before it knows the option, pytest takes a word that stands alone for a path and looks for an ini file there."""
    (adapters / "pytest.ini").write_text("[pytest]\n")
    result = run(pytester, "--lora-adapters", "adapters")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            f"ERROR: pytest took its settings from {adapters}/pytest.ini, which lies among the adapters; "
            "write --lora-adapters=DIR, with the equals sign, and give --rootdir if need be"
        ]
    )
    os.chdir(adapters)
    run(pytester, "--lora-adapters", ".").assert_outcomes(passed=16, failed=2)


@pytest.mark.parametrize("name", ["conftest.py", "__init__.py"])
def test_code_beside_an_argument_is_refused(adapters: Path, pytester: pytest.Pytester, name: str) -> None:
    (adapters / "sound" / name).write_text(EVIL)
    result = run(pytester, "adapters/sound/adapter_config.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            f"ERROR: adapters/sound/{name} lies beside adapter_config.json, and pytest would run it; "
            "--lora-adapters=adapters/sound checks the adapter and runs nothing"
        ]
    )
    assert not list(adapters.rglob("*.EXECUTED"))


def test_links_to_folders_are_not_followed(adapters: Path, pytester: pytest.Pytester, saved: Path) -> None:
    (adapters / "link").symlink_to(saved, target_is_directory=True)
    (adapters / "sound" / "loop").symlink_to(adapters, target_is_directory=True)
    result = run(pytester, "--collect-only", "-q", "--lora-adapters", "adapters")
    assert len(ids(result)) == 18


def test_a_folder_without_a_configuration_is_an_item_too(adapters: Path, pytester: pytest.Pytester) -> None:
    (adapters / "sound" / "adapter_config.json").unlink()
    result = run(pytester, "-q", "--lora-adapters", "adapters/sound")
    result.stdout.fnmatch_lines(["FAILED adapters/sound/adapter_model.safetensors::config*"])
    result.assert_outcomes(failed=1, skipped=5)
    result.stdout.no_fnmatch_line("*healthy in *")


def test_ordinary_sessions_collect_no_adapters_and_import_nothing_for_them(
    adapters: Path, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(
        "import json, sys\ndef pytest_unconfigure():\n    print('MODULES', json.dumps(sorted(sys.modules)))\n"
    )
    pytester.makepyfile("def test_plain(): ...")
    result = pytester.runpytest_subprocess(*PLAIN, "-s")
    result.assert_outcomes(passed=1)
    modules = json.loads(next(line for line in result.outlines if "MODULES" in line).partition("MODULES ")[2])
    assert not {"pytest_lora.plugin.adapter_items", "pytest_lora.findings"} & set(modules)


def test_without_a_base_torch_is_not_imported(adapters: Path, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import sys\ndef pytest_unconfigure():\n    print('TORCH', 'torch' in sys.modules)\n"
    )
    result = pytester.runpytest_subprocess(*PLAIN, "-s", "--lora-adapters", "adapters/sound")
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["*TORCH False"])


def test_collecting_opens_no_file_of_an_adapter(adapters: Path, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import sys\n"
        "def hook(event, args):\n"
        "    if event == 'open' and 'adapters' in str(args[0]):\n"
        "        print('OPENED', args[0])\n"
        "sys.addaudithook(hook)\n"
    )
    result = pytester.runpytest_subprocess(
        *PLAIN, "-s", "--collect-only", "-q", "--lora-adapters", "adapters"
    )
    assert len(ids(result)) == 18
    assert not [line for line in result.outlines if line.startswith("OPENED")]
    assert sys.version_info >= (3, 11)


def test_a_server_adds_an_item(adapters: Path, pytester: pytest.Pytester) -> None:
    shutil.rmtree(adapters / "rank")
    shutil.rmtree(adapters / "zeros")
    folders.configure(adapters / "sound", use_dora=True)
    pytester.makeini("[pytest]\nlora_adapters = adapters\nlora_serve = vllm:4\n")
    result = run(pytester, "-q", "-rf", "--lora-select=LORA46")
    result.assert_outcomes(passed=6, failed=1)
    result.stdout.fnmatch_lines(
        ["LORA461, LORA464: adapter sound: 2 errors", "*start it with --max-lora-rank 8"]
    )
    assert run(pytester, "--lora-serve=ollama").ret == pytest.ExitCode.USAGE_ERROR
    run(pytester, "-q", "--lora-serve=transformers:64", "--lora-select=LORA464").assert_outcomes(passed=7)
