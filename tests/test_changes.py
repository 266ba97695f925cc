"""Changes of settings: what a sentence says of them, and what a program gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_lora import Expect, Finding, Report
from pytest_lora.changes import Change, advise, advise_any, assigned, change, noun
from pytest_lora.rules import Rule, RuleError, Violation
from pytest_lora.values import LONGEST_OF_A_FINDING


@pytest.mark.parametrize(
    ("settings", "said", "plain"),
    [
        ({"r": 8, "lora_alpha": 0.1 + 0.2}, "r=8, lora_alpha=0.3", {"r": 8, "lora_alpha": 0.3}),
        ({"target_modules": ("q", "v")}, "target_modules=['q', 'v']", {"target_modules": ["q", "v"]}),
        ({"target_modules": []}, "target_modules=[]", {"target_modules": []}),
        ({"modules_to_save": ()}, "modules_to_save=None", {"modules_to_save": None}),
        ({"rank_pattern": {"q": 4, "v": 1.5}}, "rank_pattern={'q': 4, 'v': 1.5}", {"rank_pattern": {"q": 4, "v": 1.5}}),
        ({"rows": {"e": range(5, 8)}}, "rows={'e': list(range(5, 8))}", {"rows": {"e": [5, 6, 7]}}),
        ({"rows": {"e": (1, range(5, 7))}}, "rows={'e': [1] + list(range(5, 7))}", {"rows": {"e": [1, 5, 6]}}),
    ],
)  # fmt: skip
def test_what_is_said_and_what_a_program_gets(
    settings: dict[str, Any], said: str, plain: dict[str, Any]
) -> None:
    assert assigned(**settings) == said
    made = change("set", **settings)
    assert (made.said, made.settings, made.is_noun) == (f"set {said}", plain, False)
    assert change(**settings).said == noun(**settings).said == said
    assert noun(**settings).is_noun


def test_a_fix_is_put_together_from_its_parts() -> None:
    first, second = change("set", r=8), change(bias="none")
    inner = advise("for one ", first)
    fix = advise_any([advise(inner, ", as said"), second], "; or ")
    assert fix.text == "for one set r=8, as said; or bias='none'"
    assert fix.changes == (first, second)
    assert advise_any([]).text == advise().text == ""


def found(fix: Any) -> Finding:
    violation = Violation("here", "seen", "wanted", fix)
    known = Rule("X1", "x", "error", object, "config", ".", lambda facts, expect: iter([violation]))
    (finding,) = known(object(), Expect())
    return finding


def test_a_finding_has_the_changes_of_its_fix() -> None:
    step = change("set", target_modules=("q", "v"), rank_pattern={"q": 4})
    finding = found(advise(step, ", which helps"))
    assert finding.fix == "set target_modules=['q', 'v'], rank_pattern={'q': 4}, which helps"
    assert finding.changes == found(step).changes == (step,)
    assert found("mend it").changes == ()
    report = Report("config", (finding,))
    assert Report.from_json(report.to_json()) == report
    (written,) = json.loads(report.to_json())["findings"]
    assert written["changes"] == [
        {
            "settings": {"target_modules": ["q", "v"], "rank_pattern": {"q": 4}},
            "said": "set target_modules=['q', 'v'], rank_pattern={'q': 4}",
            "is_noun": False,
        }
    ]
    assert hash(finding) == hash(found(finding.fix))
    with pytest.raises(RuleError, match="fix must be text, not 3"):
        found(3)


def test_a_change_that_a_fix_says_no_more_is_none() -> None:
    short, long = change("set", r=8), change(target_modules=("q" * LONGEST_OF_A_FINDING,))
    finding = found(advise(short, " or ", long))
    assert finding.changes == (short,)
    assert Finding("X1", "x", "error", "w", "o", "e", "mend it", changes=(short,)).changes == ()


def test_what_is_said_of_a_name_does_nothing_to_a_terminal() -> None:
    (made,) = found(Change({"target_modules": "a\x1b[1m"}, "write a\x1b[1m")).changes
    assert made.said == r"write a\x1b[1m"
    assert made.settings == {"target_modules": "a\x1b[1m"}
