"""Flags and ini values, and what they print."""

from __future__ import annotations

import re

import pytest

from pytest_lora.bases.examples import runnable
from pytest_lora.plugin.session_options import LoraOptions
from pytest_lora.rules import catalogue
from tests.plugin.sessions import run


def test_rules_lists_every_rule(pytester: pytest.Pytester) -> None:
    result = run(pytester, "--lora-rules")
    assert result.ret == 0
    lines = [line.split(maxsplit=3) for line in result.outlines]
    assert lines == [[rule.code, rule.severity, rule.name, rule.summary] for rule in catalogue()]


@pytest.mark.parametrize("asked", ["LORA203", "lora203", "adapter_left_merged", "adapter-left-merged"])
def test_explain_prints_the_documentation(pytester: pytest.Pytester, asked: str) -> None:
    result = run(pytester, "--lora-explain", asked)
    assert result.ret == 0
    rule = next(rule for rule in catalogue() if rule.code == "LORA203")
    assert "\n".join(result.outlines) == f"LORA203 adapter_left_merged (error)\n\n{runnable(rule.doc)}"


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("LORA2O3", "did you mean LORA203? --lora-rules lists them all"),
        ("adapter_merged", "did you mean adapter_left_merged*? --lora-rules lists them all"),
        ("xyz", "--lora-rules lists them all"),
    ],
)
def test_unknown_rule_is_a_usage_error(pytester: pytest.Pytester, asked: str, hint: str) -> None:
    result = run(pytester, "--lora-explain", asked)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --lora-explain: there is no rule '{asked}'; {hint}"])


def test_missing_model_folder_is_a_usage_error(pytester: pytest.Pytester) -> None:
    pytester.mkdir("empty")
    missing = pytester.path / "llama"
    for args, message in (
        (
            ["--lora-model", "llama"],
            f"--lora-model: there is no folder '{missing}'; models are never downloaded",
        ),
        (
            ["-o", "lora_model=llama"],
            f"ini lora_model: there is no folder '{missing}'; models are never downloaded",
        ),
        (
            ["--lora-model", "empty"],
            f"--lora-model: '{pytester.path / 'empty'}' holds no config.json, so it is no transformers model",
        ),
    ):
        result = run(pytester, *args)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert f"ERROR: {message}" in result.stderr.lines


@pytest.mark.parametrize("line", ["r 16", "r = sixteen", "= 16", "lora r = 16"])
def test_ini_line_that_is_no_field_is_a_usage_error(pytester: pytest.Pytester, line: str) -> None:
    pytester.makeini(f"[pytest]\nlora_config =\n    {line}\n")
    expected = f"ini lora_config: {line!r} is not FIELD = PYTHON LITERAL, as in r = 16 or target_modules = "
    with pytest.raises(pytest.UsageError, match=re.escape(expected)):
        LoraOptions.from_config(pytester.parseconfig())


def test_slow_tests_run_only_when_asked_for(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.lora_slow\ndef test_long(): ...\ndef test_short(): ...")
    monkeypatch.delenv("RUN_SLOW", raising=False)
    result = run(pytester, "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * lora_slow: run it with --lora-slow or RUN_SLOW=1"])
    run(pytester, "--lora-slow").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("value", "slow"), [("1", True), ("yes", True), ("True", True), ("0", False), ("no", False), ("", False)]
)
def test_run_slow_is_honoured(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, value: str, slow: bool
) -> None:
    monkeypatch.setenv("RUN_SLOW", value)
    assert LoraOptions.from_config(pytester.parseconfig()).slow is slow


def test_options_are_read_from_ini(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUN_SLOW", raising=False)
    folder = pytester.mkdir("llama")
    (folder / "config.json").write_text("{}")
    pytester.makeini(
        "[pytest]\nlora_select = LORA1 LORA203\nlora_ignore = LORA109\nlora_strict = true\n"
        "lora_slow = true\nlora_model = llama\nlora_config =\n    r = 4\n    target_modules = ['a', 'b']\n"
    )
    expected = LoraOptions(
        model=folder,
        adapters=(),
        recipes=(),
        card=(1, None),
        base=None,
        bases={},
        fields={"r": 4, "target_modules": ["a", "b"]},
        select=("LORA1", "LORA203"),
        ignore=("LORA109",),
        strict=True,
        slow=True,
        device="auto",
        require_gpu=False,
        gpu_report=False,
        gpus_per_worker=0,
        ranks=(4, 8, 16),
        reports=(),
        baseline=None,
        update_baseline=False,
        step_summary=None,
    )
    assert LoraOptions.from_config(pytester.parseconfig()) == expected


def test_help_names_flags_ini_values_and_markers(pytester: pytest.Pytester) -> None:
    result = run(pytester, "--help")
    for setting in (
        "--lora-model=PATH",
        "--lora-slow",
        "--lora-device=DEVICE",
        "--lora-require-gpu",
        "--lora-gpu-report",
        "--lora-report=PATH",
        "--lora-rules",
        "--lora-explain=CODE",
    ):
        result.stdout.fnmatch_lines([f"*{setting}*"])
    for setting in (
        "lora_model (string):*",
        "lora_slow (bool):*",
        "lora_config (linelist):*",
        "lora_gpus_per_worker *",
    ):
        result.stdout.fnmatch_lines([f"*{setting}*"])
    result = run(pytester, "--markers")
    result.stdout.fnmatch_lines(
        [
            "@pytest.mark.lora(**fields): set fields of peft.LoraConfig (r=16, target_modules='all-linear') or *",
            "@pytest.mark.lora_gpu(min_vram_gb=None, count=1, capability=None): a test that needs GPUs, *",
            "@pytest.mark.lora_vram_limit(size): a GPU test that fails if more than this, *",
            "@pytest.mark.lora_slow: a slow LoRA test, skipped unless --lora-slow or RUN_SLOW=1 is given.",
        ]
    )


def test_fixtures_are_listed_with_their_documentation(pytester: pytest.Pytester) -> None:
    result = run(pytester, "--fixtures")
    for name in (
        "lora_base_model [[]session scope[]]",
        "lora_batch",
        "lora_config",
        "lora_device [[]session scope[]]",
        "lora_expect",
        "lora_model",
    ):
        result.stdout.fnmatch_lines([f"{name} -- *fixtures.py:*"])
    own = "\n".join(result.outlines).partition("fixtures defined from pytest_lora.plugin.fixtures")[2]
    own = own.partition("fixtures defined from")[0]
    assert "The peft.LoraConfig of the test, from ini lora_config, @pytest.mark.lora and" in own
    assert "no docstring" not in own
    assert "_lora_base_guard" not in own
