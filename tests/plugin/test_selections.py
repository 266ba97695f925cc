"""select, ignore and strict: of options, ini, marks and calls, for every check, item and run."""

from __future__ import annotations

from functools import partial

import pytest

from pytest_lora.bases.examples import folders, models
from tests.forked import run_forked

CHECKS = """
    import pytest
    from peft import LoraConfig
    from transformers import LlamaConfig
    from pytest_lora import assert_config_healthy, check_config

    BASE = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    WRONG = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "nonsense"])  # LORA104, an error
    RANDOM = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], lora_dropout=0.9)  # LORA121, a warning

    def test_error():
        assert_config_healthy(WRONG, BASE)

    def test_warning():
        assert_config_healthy(RANDOM, BASE)

    def test_check():
        assert not check_config(WRONG, BASE).findings
"""


@pytest.mark.parametrize(
    ("arguments", "failing"),
    [
        ([], {"test_error", "test_check"}),
        (["--lora-ignore=LORA104"], set()),
        (["--lora-ignore=LORA104", "--lora-strict"], {"test_warning"}),
        (["--lora-select=LORA121,LORA2"], set()),
        (["--lora-select=LORA1", "--lora-ignore=LORA104,LORA121", "--lora-strict"], set()),
        (["-o", "lora_ignore=LORA104"], set()),
        (["-o", "lora_select=LORA104 LORA105"], {"test_error", "test_check"}),
        (["-o", "lora_strict=true", "-o", "lora_ignore=LORA104"], {"test_warning"}),
        (["-n", "1", "--lora-ignore=LORA104", "--lora-strict"], {"test_warning"}),
    ],
)
def test_options_and_ini_reach_every_check(
    pytester: pytest.Pytester, arguments: list[str], failing: set[str]
) -> None:
    pytester.makepyfile(CHECKS)
    start = partial(run_forked, pytester) if "-n" in arguments else pytester.runpytest
    result = start(*arguments, "-W", "always::pytest_lora.LoraHealthWarning")
    names = {"test_error", "test_warning", "test_check"}
    assert {
        name for name in names if "FAILED" in "".join(line for line in result.outlines if name in line)
    } == failing
    result.assert_outcomes(passed=3 - len(failing), failed=len(failing))


def test_a_mark_adds_to_what_the_session_ignores(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        CHECKS
        + """
    @pytest.mark.lora(ignore=["LORA104"])
    def test_ignored():
        assert_config_healthy(WRONG, BASE)

    @pytest.mark.lora(ignore=["LORA104"], strict=True)
    def test_strict():
        assert_config_healthy(RANDOM, BASE)

    @pytest.mark.lora(select=["LORA2"])
    class TestClass:
        def test_selected(self):
            assert_config_healthy(WRONG, BASE)

        @pytest.mark.lora(select=["LORA104"])
        def test_closest(self):
            assert_config_healthy(WRONG, BASE)
    """
    )
    result = pytester.runpytest("-k", "ignored or strict or selected or closest")
    result.assert_outcomes(passed=2, failed=2, deselected=3)
    result.stdout.fnmatch_lines_random(
        ["FAILED *::test_strict - LORA121*", "E *LoraHealthError: LORA104: LoraConfig on *"]
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--lora-ignore=LORA1O4",
            "--lora-ignore: 'LORA1O4' is no code or start of a code; did you mean 'LORA104'?",
        ),
        ("--lora-select=target_matches_noting", "did you mean 'LORA104'?"),
        (
            "--lora-ignore=E501",
            "--lora-ignore: 'E501' is no code or start of a code; --lora-rules lists them",
        ),
    ],
)
def test_an_unknown_code_stops_the_session(pytester: pytest.Pytester, argument: str, message: str) -> None:
    pytester.makepyfile(CHECKS)
    result = pytester.runpytest(argument)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{message.replace('[', '[[]')}*"])


def test_an_unknown_code_in_a_mark_is_named_where_it_stands(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.lora(ignore=['LORA99Z'])\ndef test_it(): ...")
    result = pytester.runpytest()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*::test_it: @pytest.mark.lora: ignore: 'LORA99Z' is no code*"])


def test_saved_adapters_look_at_what_is_selected(pytester: pytest.Pytester) -> None:
    folder = pytester.mkdir("adapters")
    path = models.adapter(folder=folder)
    folders.edit(path, lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()})
    pytester.runpytest("--lora-adapters=adapters").assert_outcomes(passed=5, failed=1)
    pytester.runpytest("--lora-adapters=adapters", "--lora-ignore=LORA442").assert_outcomes(passed=6)
    loud = "-Walways::pytest_lora.LoraHealthWarning"
    folders.configure(path, base_model_name_or_path=None)  # a warning
    pytester.runpytest(loud, "--lora-adapters=adapters", "--lora-ignore=LORA442").assert_outcomes(passed=6)
    pytester.runpytest(
        loud, "--lora-adapters=adapters", "--lora-ignore=LORA442", "--lora-strict"
    ).assert_outcomes(passed=5, failed=1)


def test_sessions_without_a_selection_do_not_load_the_rules(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\ndef test_it(): assert 'pytest_lora.rules' not in sys.modules")
    assert pytester.runpytest_subprocess().ret == 0
