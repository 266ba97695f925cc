"""Files that services read from the repository: workflows, the action, hooks, templates, the citation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_lora.rules import catalogue

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEPS = ("action.yml", ".github/workflows/release.yml", "examples/ci/github-actions.yml")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def runs(part: Any) -> list[str]:
    """Every shell script in a workflow or an action."""
    if isinstance(part, dict):
        own = [part["run"]] if isinstance(part.get("run"), str) else []
        return own + [script for one in part.values() for script in runs(one)]
    return [script for one in part for script in runs(one)] if isinstance(part, list) else []


@pytest.mark.parametrize("name", STEPS)
def test_scripts_of_workflows_are_shell(name: str) -> None:
    scripts = runs(read(name))
    assert scripts
    for script in (*scripts, (ROOT / ".ci/run").read_text(), (ROOT / ".ci/today").read_text()):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script
        # What an expression holds may come from a stranger: it goes through the environment.
        assert "${{" not in script


def test_a_release_is_built_checked_attested_and_published_without_a_token() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text()
    jobs = read(".github/workflows/release.yml")["jobs"]
    assert any("twine check --strict" in script for script in runs(jobs["build"]))
    used = [step.get("uses", "").partition("@")[0] for job in jobs.values() for step in job["steps"]]
    assert {"actions/attest-build-provenance", "pypa/gh-action-pypi-publish"} <= set(used)
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "vars.PUBLISH" in jobs["publish"]["if"]
    assert not re.search(r"secrets\.|password", text)


def test_what_is_released_names_its_address_and_has_links_that_work_elsewhere(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml", ".github/public_address.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    url = "https://github.com/someone/pytest-lora"
    subprocess.run(
        [sys.executable, ".github/public_address.py", f"{url}/", "v0.1.0"], cwd=tmp_path, check=True
    )

    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert {**project, "urls": PROJECT.get("urls")} == {**PROJECT, "urls": PROJECT.get("urls")}
    assert (project["urls"]["Source"], project["urls"]["Issues"]) == (url, f"{url}/issues")
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text())
    assert f"{url}/raw/v0.1.0/docs/images/report.png" in links
    assert f"{url}/blob/v0.1.0/docs/tutorial.md" in links
    below = re.compile(re.escape(url) + r"/(?:raw|blob)/v0\.1\.0/([^#]+)")
    assert all((ROOT / below.fullmatch(link)[1]).exists() for link in links if link.startswith(url))
    assert all(link.startswith(("https://", "#")) for link in links)


def test_templates_ask_for_the_json_of_a_report() -> None:
    for name in ("wrong_finding", "bug"):
        form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
        asked = {one["id"]: one for one in form["body"]}
        assert "--lora-report=report.json" in asked["report"]["attributes"]["description"]


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert (citation["version"], citation["title"], citation["license"]) == (
        PROJECT["version"],
        PROJECT["name"],
        PROJECT["license"],
    )


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_what_the_guides_name_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    for path in re.findall(r"`((?:pytest_lora|tests|\.ci|docs)[\w./]*)`|\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / "".join(path)).exists(), path
    if stages := re.search(r"folder in `pytest_lora/rules`: ([^.]+)\.", text):
        assert {*re.findall(r"`(\w+)`", stages[1])} <= {rule.stage for rule in catalogue()}
