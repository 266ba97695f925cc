"""What is printed in place of a session: the rules, the page of one, the effective setting of a recipe."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest

from pytest_lora.bases.examples import runnable
from pytest_lora.facts.figures.recipes import RecipeCard, recipe_card
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.rules import Rule, catalogue
from pytest_lora.values import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


def show_rules(config: pytest.Config) -> int:
    """Print what was asked for.

    Returns:
        The exit status.

    Raises:
        pytest.UsageError: There is no such rule.
    """
    lines = rule_list() if config.getoption("lora_rules") else rule_page(config.getoption("lora_explain"))
    print("\n".join(lines))
    return int(pytest.ExitCode.OK)


def rule_list() -> Iterator[str]:
    """One line a rule, ordered by code."""
    rules = catalogue()
    width = max(len(rule.name) for rule in rules)
    for rule in rules:
        yield f"{rule.code}  {rule.severity:<7}  {rule.name:<{width}}  {rule.summary}"


def rule_page(wanted: str) -> Iterator[str]:
    """The documentation of the rule with this code or name."""
    rule = _find(wanted)
    yield f"{rule.code} {rule.name} ({rule.severity})"
    yield ""
    yield runnable(rule.doc)


def _find(wanted: str) -> Rule:
    known = {key: rule for rule in catalogue() for key in (rule.code.lower(), rule.name)}
    asked = wanted.lower().replace("-", "_")
    if asked in known:
        return known[asked]
    # A letter in a number is what a mistyped code most often is.
    digits = "lora" + asked[4:].translate(str.maketrans("oil", "011"))
    keys = [key for key in known if key.startswith("lora") == asked.startswith("lora")]
    close = [digits] if digits in known else difflib.get_close_matches(asked, keys, cutoff=0.5)
    names = [known[key].code if key.startswith("lora") else key for key in close]
    hint = f"did you mean {', '.join(names)}? " if close else ""
    raise pytest.UsageError(f"--lora-explain: there is no rule {wanted!r}; {hint}--lora-rules lists them all")


def show_recipe(config: pytest.Config) -> int:
    """Print the table.

    Returns:
        The exit status.

    Raises:
        pytest.UsageError: There is no such file.
    """
    from pytest_lora.inspection.recipe import recipe_facts

    given = config.getoption("lora_show_recipe")
    path = config.invocation_params.dir / given
    if not path.is_file():
        raise pytest.UsageError(f"--lora-show-recipe: there is no file {given!r}")
    print("\n".join(map(printable, recipe_lines(recipe_facts(path)))))
    return int(pytest.ExitCode.OK)


def recipe_lines(facts: RecipeFacts) -> Iterator[str]:
    """The setting, a line a value: its name, what the run has, where that is from, and what was asked for."""
    if facts.flaw is not None:
        yield f"{facts.name}:{facts.flaw.line}: no YAML: {facts.flaw.message}"
        return
    card = recipe_card(facts)
    if card is None:
        yield f"{facts.name}: left alone, {facts.left_alone}"
        return
    yield f"{facts.name}: a recipe of {facts.tool}"
    yield from setting_lines(card)
    for one in facts.unknown:
        yield f"  line {one.line}: nothing reads `{one.key}`"


def setting_lines(card: RecipeCard) -> Iterator[str]:
    """The effective setting, a line a value."""
    names = max((len(row.name) for row in card.rows), default=0)
    width = min(40, max((len(row.value) for row in card.rows), default=0))
    for row in card.rows:
        yield f"  {row.name:<{names}}  {row.value:<{width}}  {row.source}".rstrip()
        if row.asked:
            yield f"  {'':<{names}}  asked for {row.asked}: {row.why}"
