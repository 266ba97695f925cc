"""``python -m pytest_lora check``, the hooks of pre-commit and the steps of the GitHub action."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_lora.__main__ import main
from tests.plugin import test_recipe_items
from tests.plugin.test_adapter_items import UNSERVED

RECIPE = test_recipe_items.RECIPE.replace("Qwen/Qwen2.5-0.5B", "acme/base")
"""On a base that nobody knows, which nobody builds."""

HERE = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound and a faulty recipe, a file that is none, an adapter without weights, and code that must not run."""
    for name in (
        "configs/sound.yaml",
        "configs/asks.yml",
        "configs/compose.yaml",
        "adapters/cut/adapter_config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "configs/sound.yaml").write_text(RECIPE)
    (tmp_path / "configs/asks.yml").write_text(RECIPE + "load_in_4bit: true\n")
    (tmp_path / "configs/compose.yaml").write_text("services:\n  web: [\n")
    (tmp_path / "adapters/cut/adapter_config.json").write_text('{"peft_type": "LORA"')
    for name in ("conftest.py", "adapters/conftest.py", "test_it.py"):
        (tmp_path / name).write_text("raise SystemExit('executed')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return tmp_path


def test_the_items_of_both_options_and_nothing_else(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", ".", "--json"]) == 1
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert "failed" in told.err
    assert {test["nodeid"].partition("::")[0] for test in report["tests"]} == {
        "configs/sound.yaml",
        "configs/asks.yml",
        "adapters/cut/adapter_config.json",
    }
    assert (report["collected"], report["counts"]["failed"]) == (2 + len(UNSERVED), 2)
    assert {f["code"] for test in report["tests"] for one in test["reports"] for f in one["findings"]} >= {
        "LORA610"
    }


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["configs/sound.yaml"], 0),
        (["adapters/cut/adapter_config.json", "--lora-select=LORA1"], 0),
        (["adapters/cut"], 1),
        (["configs/sound.yaml", "--lora-card=1"], 4),
        (["nowhere"], 4),
        (["configs/compose.yaml", "--if-any"], 0),
        (["configs/compose.yaml", "configs/asks.yml", "--if-any"], 1),
    ],
)
def test_the_exit_status_is_that_of_pytest(project: Path, arguments: list[str], status: int) -> None:
    assert main(["check", *arguments, "-q"]) == status


def test_a_name_on_the_hub_says_what_to_do(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "owner/adapter"]) == 4
    assert "hf download owner/adapter --local-dir adapter" in capsys.readouterr().err


def environment(**more: str) -> dict[str, str]:
    """That of a shell in which this Python is called python, whose pytest leaves out what is slow to load."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "GITHUB_", "GIT_"))
    }
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**kept, "PATH": path, "PYTHONPATH": str(HERE), "PYTEST_ADDOPTS": "-p no:xdist", **more}


@pytest.mark.lora_slow
def test_pre_commit_runs_the_hooks(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("pre_commit")
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    where = environment(PRE_COMMIT_HOME=str(tmp_path_factory.mktemp("home")), GIT_CONFIG_GLOBAL=os.devnull)

    def git(folder: Path, *arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=folder, env=where, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    hooks = tmp_path_factory.mktemp("hooks")
    shutil.copy(HERE / ".pre-commit-hooks.yaml", hooks)
    git(hooks, "init", "-q")
    git(hooks, "add", ".")
    git(hooks, "commit", "-qm", "hooks")
    used = [{"id": "lora-adapters"}, {"id": "lora-recipes", "args": ["--lora-ignore=LORA1"]}]
    config = {"repos": [{"repo": str(hooks), "rev": git(hooks, "rev-parse", "HEAD"), "hooks": used}]}
    (project / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    git(project, "init", "-q")
    git(project, "add", ".")

    def ran(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pre_commit", "run", "--color=never", *arguments]
        done = subprocess.run(command, cwd=project, env=where, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    status, told = ran("--all-files")
    assert status == 1, told
    assert re.search(r"^saved LoRA adapters\.+Failed$", told, re.MULTILINE)
    assert re.search(r"^LoRA recipes\.+Failed$", told, re.MULTILINE)
    assert "--> asks.yml:9: load_in_4bit" in told
    status, told = ran("--files", "configs/compose.yaml")
    assert status == 0, told
    assert re.search(r"^saved LoRA adapters\.+\(no files to check\)Skipped$", told, re.MULTILINE)
    assert re.search(r"^LoRA recipes\.+Passed$", told, re.MULTILINE)


@pytest.mark.lora_slow
def test_the_steps_of_the_action_run(project: Path) -> None:
    action: dict[str, Any] = yaml.safe_load((HERE / "action.yml").read_text())
    inputs = {name: one.get("default", "") for name, one in action["inputs"].items()}
    inputs |= {"paths": "configs adapters", "options": "-q --lora-ignore=LORA1", "install": "--no-index pip"}
    outputs: dict[str, str] = {}

    def put(text: str) -> str:
        known = {f"inputs.{name}": value for name, value in inputs.items()}
        known |= {f"steps.check.outputs.{name}": value for name, value in outputs.items()}
        return re.sub(r"\$\{\{ (.+?) \}\}", lambda found: known[found[1]], text)

    statuses: dict[str, int] = {}
    said = ""
    github = {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(project)}
    github |= {name: str(project / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for step in action["runs"]["steps"]:
        if "run" not in step:
            assert {put(value) for value in step["with"].values()} & {
                "lora-report",
                "lora-report/findings.sarif",
            }
            continue
        assert step["shell"] == "bash"
        where = environment(**github, **{name: put(value) for name, value in step["env"].items()})
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            env=where,
            cwd=project,
            capture_output=True,
            text=True,
            check=False,
        )
        statuses[step["name"]], said = done.returncode, said + done.stdout + done.stderr
        if (project / "GITHUB_OUTPUT").exists():
            lines = (project / "GITHUB_OUTPUT").read_text().splitlines()
            outputs |= dict(line.split("=", 1) for line in lines)
    assert statuses == {"Install": 0, "Check": 0, "Fail where errors were found": 1}, said
    assert "Requirement already satisfied: pip" in said
    assert "::error file=configs/asks.yml,line=9,title=LORA610" in said
    assert (project / "GITHUB_STEP_SUMMARY").read_text().startswith("## LoRA report: ")
    log = json.loads((project / outputs["sarif"]).read_text())
    places = [one["locations"][0]["physicalLocation"] for one in log["runs"][0]["results"]]
    assert {place["artifactLocation"]["uri"] for place in places} == {
        "configs/asks.yml",
        "adapters/cut/adapter_config.json",
    }
    assert (project / "lora-report/report.html").is_file()
