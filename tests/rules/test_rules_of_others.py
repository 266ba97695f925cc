"""A package with rules of its own: built, installed, and known to every check, option and page."""

from __future__ import annotations

import os
import shutil
from contextlib import chdir
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.forked import run_forked

PACKAGE = Path(__file__).parents[2] / "examples" / "own_rules"

TESTS = """
from peft import LoraConfig
from pytest_lora import assert_checkpoint_healthy, assert_config_healthy, check_config
from pytest_lora.bases.examples import adapter, llama_7b

TWELVE = LoraConfig(r=12, lora_alpha=24, target_modules=["q_proj", "v_proj"])


def test_fires():
    assert [f.code for f in check_config(TWELVE, llama_7b).findings] == ["ACME001"]


def test_ignored():
    assert_config_healthy(TWELVE, llama_7b, ignore=["ACME"])


def test_saved_adapters():
    path = adapter(r=12, lora_alpha=24)
    assert_checkpoint_healthy(path, select=["ACME001"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, built and installed into a folder of its own."""
    build = pytest.importorskip("hatchling.build")
    source = tmp_path_factory.mktemp("source") / "own_rules"
    shutil.copytree(PACKAGE, source)
    target = tmp_path_factory.mktemp("installed")
    with chdir(source):
        wheel = source / build.build_wheel(str(source))
    with ZipFile(wheel) as archive:  # which is what installing a wheel of Python alone is
        archive.extractall(target)
    return target


def run(
    pytester: pytest.Pytester, installed: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> pytest.RunResult:
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return run_forked(pytester, *arguments)


def test_rules_of_another_package_are_rules(
    pytester: pytest.Pytester, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(TESTS)
    result = run(pytester, installed, monkeypatch)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "E*pytest_lora.LoraHealthError: ACME001: adapter *: 1 error",
            "E*error?ACME001?: rank is no power of two",
            "E*observed: r=12 is no power of two",
            "E*fix: *r=16",
            "ACME001 error *rank is no power of two*",
        ]
    )
    ignored = run(pytester, installed, monkeypatch, "--lora-ignore=ACME001", "-k", "saved")
    ignored.assert_outcomes(passed=1, deselected=2)


def test_rules_of_another_package_are_listed_and_explained(
    pytester: pytest.Pytester, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = run(pytester, installed, monkeypatch, "--lora-rules")
    listed.stdout.fnmatch_lines(["ACME001  error    rank_is_no_power_of_two *The rank is no power of two."])
    explained = run(pytester, installed, monkeypatch, "--lora-explain=ACME001")
    explained.stdout.fnmatch_lines(
        ["ACME001 rank_is_no_power_of_two (error)", "from peft import LoraConfig", "report = check_config*"]
    )


def test_what_is_explained_runs_as_it_is_printed(
    pytester: pytest.Pytester, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(run(pytester, installed, monkeypatch, "--lora-explain=ACME001").stdout)
    example = text.partition("```python\n")[2].partition("```")[0]
    pytester.makepyfile(
        f"{example}\n\ndef test_it():\n    assert [f.code for f in report.findings] == ['ACME001']\n"
    )
    run(pytester, installed, monkeypatch).assert_outcomes(passed=1)
