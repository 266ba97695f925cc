"""The words of every fix are applied: the finding goes, no fault appears, nothing of the user's is lost."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from pytest_lora import Finding
from pytest_lora.rules import Rule, catalogue
from tests.rules.remedies.by_hand import BY_HAND, STAGES_BY_HAND, by_hand
from tests.rules.remedies.cases import CASES
from tests.rules.remedies.kept import lost, possessions
from tests.rules.remedies.recipe_lines import Edit, edits
from tests.rules.remedies.rewritten import REWRITTEN, Rewriting
from tests.rules.remedies.script import executed
from tests.rules.remedies.ways import offered
from tests.rules.remedies.words import alternatives
from tests.rules.test_catalogue import SLOW, code

every_rule = pytest.mark.parametrize(
    "known",
    [pytest.param(r, marks=[pytest.mark.lora_slow] if r.name in SLOW else []) for r in catalogue()],
    ids=[f"{r.code}-{r.name}" for r in catalogue()],
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts about recipes write files where they run."""
    monkeypatch.chdir(tmp_path)


def prove(judged: str, source: str) -> int:
    """Take each way that the fixes of one rule offer for a script, and return how many there are."""
    findings, _ = outcome(source)
    mine = of(judged, findings)
    assert mine, f"{judged} has nothing to say about\n{source}"
    return sum(mends(judged, source, way) for way in range(max(len(offered(f)) for f in mine)))


def mends(judged: str, source: str, way: int) -> bool:
    """Take one way, finding after finding, until the rule is silent; False where it is about nothing in the script."""
    findings, owned = outcome(source)
    while mine := of(judged, findings):
        ways = offered(mine[0])
        script = ways[min(way, len(ways) - 1)](source) if ways else None
        if script is None:
            return False
        after, still_owned = outcome(script)
        said = f"{mine[0].fix}\n\n{script}\n\n" + "\n\n".join(map(str, after))
        assert len(of(judged, after)) < len(mine), said
        assert grave(after) <= grave(findings), said
        assert not lost(owned, still_owned, mine), said
        source, findings, owned = script, after, still_owned
    return True


def grave(findings: Iterable[Finding]) -> set[str]:
    """Codes of errors and warnings; an info, such as that memory is short, asks for no change."""
    return {finding.code for finding in findings if finding.severity != "info"}


@cache
def outcome(source: str) -> tuple[tuple[Finding, ...], set[str]]:
    """The findings of a script, and what the user has in it."""
    names = executed(source)
    return names["report"].findings, possessions(names)


def of(judged: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.code == judged]


@every_rule
def test_the_fix_of_the_example_mends_it(known: Rule) -> None:
    if reason := by_hand(known):
        pytest.skip(reason)
    if known.code in REWRITTEN:
        pytest.skip("its fix is prose, and applied below")
    assert prove(known.code, code(known, "Example")), f"{known.code}: no step of the fix could be applied"


@pytest.mark.parametrize(
    ("judged", "way"), [(judged, way) for judged, ways in REWRITTEN.items() for way in ways]
)
def test_lines_that_a_fix_in_prose_changes_mend_the_example(judged: str, way: Rewriting) -> None:
    (known,) = (one for one in catalogue() if one.code == judged)
    source = code(known, "Example")
    assert source.count(way.old) == 1, source
    script = source.replace(way.old, way.new)
    (findings, owned), (after, still_owned) = outcome(source), outcome(script)
    mine = of(judged, findings)
    assert mine
    assert all(way.said in finding.fix for finding in mine), mine
    said = f"{script}\n\n" + "\n\n".join(map(str, after))
    assert not of(judged, after), said
    assert grave(after) <= grave(findings), said
    assert all(way.gone and one.endswith(way.gone) for one in lost(owned, still_owned, mine)), said


def test_fixes_that_are_done_by_hand_are_of_rules_that_exist() -> None:
    assert BY_HAND.keys() <= {known.code for known in catalogue()}
    assert not BY_HAND.keys() & REWRITTEN.keys()
    assert STAGES_BY_HAND.keys() <= {known.stage for known in catalogue()}


@pytest.mark.parametrize(("judged", "source"), CASES)
def test_the_fix_mends_other_cases(judged: str, source: str) -> None:
    assert prove(judged, source), f"{judged}: no step of the fix could be applied"


@pytest.mark.parametrize(
    ("fix", "steps"),
    [
        ("set lora_alpha=16, which gives a scaling of 2", [["lora_alpha=16"]]),
        ("set r=8 with lora_alpha=1.5e-3, or bias='none'.", [["r=8", "lora_alpha=1.5e-3"], ["bias='none'"]]),
        ("target_modules=r'.*\\.(q|v)_proj' (older PEFT)", [["target_modules=r'.*\\.(q|v)_proj'"]]),
        (
            "rows={'a': list(range(1, 3))}; else model.eval()",
            [["rows={'a': list(range(1, 3))}"], ["model.eval()"]],
        ),
        ("model.peft_config['a'].r = 8", [["model.peft_config['a'].r = 8"]]),
        ("base = base.unload() before it", [["base = base.unload()"]]),
        ("load it (or not) with llm.int8(), 4-bit", [["llm.int8()"]]),
        ("check that training reached these modules", []),
    ],
)
def test_code_is_read_from_words(fix: str, steps: list[list[str]]) -> None:
    assert [[step.code for step in way] for way in alternatives(fix)] == steps


@pytest.mark.parametrize(
    ("fix", "ways"),
    [
        ("write `a: 1` and `b: 2`", [[Edit("write", "a: 1"), Edit("write", "b: 2")]]),
        ("add `use_peft: true`, or remove the LoRA keys", [[Edit("add", "use_peft: true")]]),
        ("keep one of the two lines, `a: 1` or `a: 2`", [[Edit("keep", "a: 1")], [Edit("keep", "a: 2")]]),
        ("write `lora_r: 8` in its place", [[Edit("write", "lora_r: 8", in_its_place=True)]]),
        ("take 10 cards or more (`gpus=10`)", [[Edit("", "gpus=10")]]),
        ("indent with spaces instead of the tab", [[Edit("untab", "")]]),
        ("mend the line, or the one before it", []),
    ],
)
def test_edits_are_read_from_words(fix: str, ways: list[list[Edit]]) -> None:
    assert edits(fix) == ways
