"""A rule of another package that is broken is named, whatever it does, and no argument of the user's is blamed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora import Expect, Finding, Report, check_config, rules
from pytest_lora.bases.examples import llama_7b
from pytest_lora.rules import Rule, RuleError, Violation

odd = st.one_of(
    st.none(),
    st.integers(),
    st.binary(max_size=3),
    st.lists(st.text(max_size=2), max_size=2),
    st.text(max_size=9),
)
words = st.text(max_size=3)
violations = st.one_of(
    odd,
    st.builds(Violation, odd, odd, odd, odd, odd, odd, st.booleans()),
    st.builds(Violation, words, words, words, words, st.sampled_from([None, "info", "fatal", 3]), odd),
    st.tuples(odd, odd),
)


def made(judge: Any) -> Rule:
    judge.__module__ = "acme.rules"
    return Rule("ACME001", "acme_rule", "error", object, "config", "Doc.", judge)


@settings(deadline=None, max_examples=100)
@given(st.lists(violations, max_size=3) | odd)
def test_what_a_rule_gives_is_findings_or_names_the_rule(given_back: Any) -> None:
    found = []
    with suppress(RuleError):
        found = list(made(lambda facts, expect: given_back)(object(), Expect()))
    assert all(type(one) is Finding for one in found)
    assert all(
        type(text) is str for one in found for text in (one.where, one.observed, one.expected, one.fix)
    )
    assert {one.severity for one in found} <= {"error", "warning", "info"}
    assert (
        Report.from_json(Report("x", tuple(found)).to_json()).findings == Report("x", tuple(found)).findings
    )


def raising(facts: object, expect: Expect) -> Iterator[Violation]:
    yield Violation("w", "o", "e", "f")
    raise RuntimeError("boom")


def test_a_check_names_the_rule_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = rules.rules_for
    monkeypatch.setattr(rules, "rules_for", lambda facts: (*fitting(facts), made(raising)))
    from peft import LoraConfig

    with pytest.raises(
        RuleError, match=r"^rule ACME001 \(acme_rule in acme.rules\) .*RuntimeError: boom; mend it"
    ):
        check_config(LoraConfig(r=8, target_modules=["q_proj"]), llama_7b)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise SystemExit(3)", "SystemExit"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_named(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, source: str, told: str
) -> None:
    folder = tmp_path_factory.mktemp("broken")
    (folder / f"broken_{told.lower()}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    entry = importlib.metadata.EntryPoint("acme", f"broken_{told.lower()}", rules.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    with pytest.raises(RuleError, match=rf"^the rules of acme = broken_\w+ \(.*\) cannot be loaded: {told}"):
        rules._load_others.__wrapped__()


@pytest.mark.parametrize(
    ("name", "code", "aliases"),
    [
        ("loss_is_summed", "ACME900", ()),
        ("acme_loss", "LORA325", ()),
        ("acme_loss", "ACME900", ["LORA325"]),
    ],
)
def test_a_name_or_a_code_that_is_taken(name: str, code: str, aliases: list[str]) -> None:
    assert rules.find("LORA325") is not None

    def own(facts: object, expect: Expect) -> Iterator[Violation]:
        """Doc."""
        yield from ()

    own.__name__ = name
    with pytest.raises(
        ValueError, match=f"rule '{name}': its name or its code {code} is already that of 'loss_is_summed'"
    ):
        rules.rule(code, severity="error", needs=object, aliases=aliases)(own)


def test_rules_on_facts_of_others_may_be_anywhere() -> None:
    from pytest_lora.facts.config import ConfigFacts
    from pytest_lora.facts.optimizer import OptimizerFacts

    assert [rules._home(facts) for facts in (ConfigFacts, OptimizerFacts, Rule)] == [
        "config",
        "training",
        None,
    ]
