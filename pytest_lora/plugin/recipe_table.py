"""What ``--lora-show-recipe`` prints: the effective setting of a recipe, and what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_lora.facts.figures.recipes import RecipeCard, recipe_card
from pytest_lora.facts.recipe import RecipeFacts
from pytest_lora.values import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


def show(config: pytest.Config) -> int:
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
    print("\n".join(map(printable, table(recipe_facts(path)))))
    return int(pytest.ExitCode.OK)


def table(facts: RecipeFacts) -> Iterator[str]:
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
