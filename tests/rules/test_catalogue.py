"""The documentation of every rule is executed: its example fires that rule alone, its mended form none."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

import pytest_lora.rules
from pytest_lora.bases.examples.models import FUSED_BY_PEFT, TAKES_TOKEN_TYPES
from pytest_lora.rules import Rule, catalogue, rules_for
from tests.forked import fork_ranks, outcome
from tests.namespace import run
from tests.rules.remedies.by_hand import by_hand
from tests.rules.remedies.ways import offered

SECTIONS = ("What it does", "Why is this bad?", "Example", "Use instead", "References")
STAGES = {
    "1": {"config"},
    "2": {"model"},
    "3": {"training", "history"},
    "4": {"checkpoint"},
    "5": {"memory"},
    "6": {"recipe"},
    "9": {"behaviour", "sweep"},
}

FIELDS_OF_NEWER_PEFT = {"alora_invocation_tokens"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples about recipes write files where they run; of those with several processes each is a fork."""
    monkeypatch.chdir(tmp_path)
    fork_ranks(monkeypatch)


every_rule = pytest.mark.parametrize("known", catalogue(), ids=lambda r: f"{r.code}-{r.name}")

SLOW = {"adapters_differ_between_ranks"}
"""Rules whose examples start several processes."""

every_example = pytest.mark.parametrize(
    "known",
    [pytest.param(r, marks=[pytest.mark.lora_slow] if r.name in SLOW else []) for r in catalogue()],
    ids=[f"{r.code}-{r.name}" for r in catalogue()],
)


def section(known: Rule, title: str) -> str:
    parts = re.split(r"^## (.+)$", known.doc, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title].strip()


def code(known: Rule, title: str) -> str:
    block = re.fullmatch(r"```python\n(.*?)```", section(known, title), flags=re.DOTALL)
    assert block, f"{known.code}: section {title!r} must be one python block"
    for field in FIELDS_OF_NEWER_PEFT - LoraConfig.__dataclass_fields__.keys():
        if f"{field}=" in block[1]:
            pytest.skip(f"this version of PEFT has no {field}")
    if "mm_token_type_ids" in block[1] and not TAKES_TOKEN_TYPES:
        pytest.skip("this version of transformers has no mm_token_type_ids")
    if "shared_experts)" in block[1] and not FUSED_BY_PEFT:
        pytest.skip("this version of PEFT takes no names of modules for fused experts")
    return block[1]


@every_rule
def test_documentation_has_every_section(known: Rule) -> None:
    assert tuple(re.findall(r"^## (.+)$", known.doc, flags=re.MULTILINE)) == SECTIONS
    assert all(section(known, title) for title in SECTIONS)
    assert known.summary.endswith(".")


@every_rule
def test_code_says_the_stage(known: Rule) -> None:
    assert re.fullmatch(r"LORA[1-69]\d\d", known.code)
    assert known.stage in STAGES[known.code[4]]


@every_example
def test_example_fires_this_rule_alone(known: Rule) -> None:
    """And a fix that is said to be done by hand has nothing that a program could apply."""
    source = code(known, "Example")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = run(source)
    assert {f.code for f in report.findings} == {known.code}, str(report)
    assert known.severity in {f.severity for f in report.findings}
    if reason := by_hand(known):
        for finding in report.findings:
            assert all(way(source) is None for way in offered(finding)), f"{reason}: {finding.fix}"


@every_example
def test_use_instead_is_clean_under_every_rule(known: Rule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = run(code(known, "Use instead"))
    assert not report.findings, str(report)


def test_each_rule_is_one_function_in_a_file_of_its_name() -> None:
    files = {p for p in Path(pytest_lora.rules.__file__).parent.glob("*/*.py") if p.stem != "__init__"}
    assert {p.stem for p in files} == {r.name for r in catalogue()}
    for file in files:
        public = [
            node.name
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
        assert public == [file.stem]


@every_rule
def test_rules_are_found_by_the_facts_that_they_judge(known: Rule) -> None:
    assert known in rules_for(known.needs)


def test_a_check_loads_the_rules_of_its_facts_alone() -> None:
    loaded = outcome(lambda: exec(LOADS, {})).stdout.split()
    assert loaded == ["config", "True"]


LOADS = """
import sys
from pytest_lora import rules
from pytest_lora.facts.config import ConfigFacts
rules.rules_for(ConfigFacts)
print(*{name.split(".")[2] for name in sys.modules if name.startswith("pytest_lora.rules.") and name.count(".") == 3})
stages = {rule.stage for rule in rules.catalogue()}
print(all(rules.number_of_rules(s) == sum(r.stage == s for r in rules.catalogue()) for s in stages))
"""


def test_rules_fit_facts_that_were_imported_anew() -> None:
    """pytest's own pytester takes what was imported within out of ``sys.modules`` again; what came before stays."""

    def checked_twice() -> None:
        from pytest_lora import check_config, check_training
        from pytest_lora.bases.examples import base, batch

        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
        check_config(config, base)
        model: Any = get_peft_model(base, config)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        before = dict(sys.modules)
        seen = []
        for _ in range(2):
            seen.append([finding.code for finding in check_training(model, batch).findings])
            sys.modules.clear()
            sys.modules.update(before)
        assert seen[0]
        assert seen[0] == seen[1]

    done = outcome(checked_twice)
    assert done.returncode == 0, done.stderr
