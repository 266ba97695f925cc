"""``--lora-recipes``, ``--lora-card`` and ``--lora-show-recipe`` as a user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.sessions import run

RECIPE = """base_model: Qwen/Qwen2.5-0.5B
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
micro_batch_size: 1
sequence_len: 512
learning_rate: 0.0002
"""


@pytest.fixture
def configs(pytester: pytest.Pytester) -> Path:
    folder = pytester.mkdir("configs")
    (folder / "sound.yaml").write_text(RECIPE)
    (folder / "asks.yml").write_text(RECIPE + "load_in_4bit: true\n")
    (folder / "compose.yaml").write_text("services:\n  web:\n    image: x\n")
    (folder / "broken.yaml").write_text(RECIPE + "lora_r: [\n")
    (folder / "helm.yaml").write_text("{{ if x }}\n")
    inner = folder / "inner"
    inner.mkdir()
    (inner / "typo.yaml").write_text(RECIPE + "gradient_checkpoint: true\n")
    return folder


def test_each_recipe_is_a_test_and_the_rest_is_counted(configs: Path, pytester: pytest.Pytester) -> None:
    (configs / "inner/conftest.py").write_text("raise SystemExit('executed')\n")
    result = run(pytester, "--lora-recipes=configs")
    result.assert_outcomes(passed=2, failed=2, warnings=1)
    result.stdout.fnmatch_lines(["4 of 6 files are LoRA recipes"])
    result.stdout.fnmatch_lines(
        ["error[[]LORA610[]]: quantization does not happen", "  --> asks.yml:9: load_in_4bit"]
    )
    result.stdout.fnmatch_lines(["error[[]LORA601[]]: recipe is no yaml"])
    result.stdout.fnmatch_lines(["*typo.yaml:9: LoraHealthWarning: warning[[]LORA603[]]: key is not known"])


def test_one_recipe_can_be_named_and_ini_does_it_too(configs: Path, pytester: pytest.Pytester) -> None:
    run(pytester, "--lora-recipes=configs/sound.yaml").assert_outcomes(passed=1)
    pytester.makeini("[pytest]\nlora_recipes = configs/sound.yaml\nlora_card = 1GiB\n")
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["error[[]LORA50*"])


def test_the_memory_of_a_card_is_judged(configs: Path, pytester: pytest.Pytester) -> None:
    run(pytester, "--lora-recipes=configs/sound.yaml", "--lora-card=2x24GiB").assert_outcomes(passed=1)
    run(pytester, "--lora-recipes=configs/sound.yaml", "--lora-card=1GiB").assert_outcomes(failed=1)


def test_select_and_strict_reach_recipes(configs: Path, pytester: pytest.Pytester) -> None:
    typo = "--lora-recipes=configs/inner/typo.yaml"
    run(pytester, typo, "--lora-ignore=LORA603").assert_outcomes(passed=1)
    run(pytester, typo, "-o", "lora_strict=true").assert_outcomes(failed=1)


def test_findings_annotate_the_line_of_the_recipe(
    configs: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = run(pytester, "--lora-recipes=configs/asks.yml")
    result.stdout.fnmatch_lines(["::error file=configs/asks.yml,line=9,title=LORA610 *"])


def test_show_recipe_prints_the_setting(configs: Path, pytester: pytest.Pytester) -> None:
    result = run(pytester, "--lora-show-recipe=configs/asks.yml")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "asks.yml: a recipe of Axolotl",
            "  quantization * line 9",
            "*asked for load_in_4bit: true (4-bit weights): Axolotl quantizes to 4 bits only under adapter: qlora",
            "  batch_size * 1 * line 6",
        ]
    )
    left = run(pytester, "--lora-show-recipe=configs/compose.yaml")
    left.stdout.fnmatch_lines(["compose.yaml: left alone, it is no recipe of a tool that is known"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lora-recipes=nowhere"], "--lora-recipes: there is no file or folder '{path}/nowhere'"),
        (["--lora-card=24"], "--lora-card: '24' is no memory of cards"),
        (["--lora-card=0x24GiB"], "--lora-card: '0x24GiB' is no memory of cards; write 24GiB or 8x80GiB"),
        (["--lora-show-recipe=nowhere"], "--lora-show-recipe: there is no file 'nowhere'"),
    ],
)
def test_wrong_values_are_usage_errors(pytester: pytest.Pytester, args: list[str], message: str) -> None:
    result = run(pytester, *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any(
        line.startswith(f"ERROR: {message.format(path=pytester.path)}") for line in result.stderr.lines
    )


def test_an_id_that_was_printed_can_be_run_again(
    configs: Path, pytester: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (failed,) = [line.split()[1] for line in run(pytester, "--lora-recipes=configs/asks.yml").outlines
                 if line.startswith("FAILED")]  # fmt: skip
    assert failed == "configs/asks.yml::recipe"
    inner = "configs/inner/typo.yaml::recipe"
    for flags in (["--lora-recipes=configs"], ["-o", "lora_recipes=configs"]):
        result = run(pytester, *flags, failed)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines([f"FAILED {failed}*"])
        run(pytester, *flags, failed, inner).assert_outcomes(failed=1, passed=1, warnings=1)
        run(pytester, *flags, "configs/inner/typo.yaml").assert_outcomes(passed=1, warnings=1)
    pytester.makepyfile("def test_plain(): ...")
    run(pytester, "-o", "lora_recipes=configs", "test_an_id_that_was_printed_can_be_run_again.py").assert_outcomes(
        passed=1
    )  # fmt: skip
    run(pytester, "--lora-recipes=configs", "configs").assert_outcomes(passed=2, failed=2, warnings=1)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "recipes"
    elsewhere.mkdir()
    (elsewhere / "of\u202eme.yml").write_text(RECIPE)
    (elsewhere / "other.yml").write_text(RECIPE)
    (outside, _) = [
        line
        for line in run(pytester, f"--lora-recipes={elsewhere}", "--collect-only", "-q").outlines
        if line.startswith("recipes/")
    ]
    assert outside == "recipes/of%E2%80%AEme.yml::recipe"
    run(pytester, f"--lora-recipes={elsewhere}", outside).assert_outcomes(passed=1)


def test_naming_a_recipe_runs_no_code_beside_it(configs: Path, pytester: pytest.Pytester) -> None:
    (configs / "conftest.py").write_text("raise SystemExit('executed')\n")
    result = run(pytester, "--lora-recipes=configs", "configs/sound.yaml::recipe")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: configs/conftest.py lies beside sound.yaml, and pytest would run it; "
            "--lora-recipes=configs/sound.yaml checks the recipe and runs nothing"
        ]
    )
