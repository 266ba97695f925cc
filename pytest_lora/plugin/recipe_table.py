"""What ``--lora-show-recipe`` prints: the effective setting of a recipe, and what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_lora.facts.recipe import RecipeFacts, Value

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
    print("\n".join(table(recipe_facts(path))))
    return int(pytest.ExitCode.OK)


def table(facts: RecipeFacts) -> Iterator[str]:
    """The setting, a line a value: its name, what the run has, where that is from, and what was asked for."""
    if facts.flaw is not None:
        yield f"{facts.name}:{facts.flaw.line}: no YAML: {facts.flaw.message}"
        return
    if facts.setting is None:
        yield f"{facts.name}: left alone, {facts.left_alone}"
        return
    yield f"{facts.name}: a recipe of {facts.tool}"
    rows = [(name, _shown(value), value) for name, value in facts.setting.values()]
    names = max(len(name) for name, _, _ in rows)
    width = min(40, max(len(shown) for _, shown, _ in rows))
    for name, shown, value in rows:
        yield f"  {name:<{names}}  {shown:<{width}}  {value.source}".rstrip()
        if value.asked is not None:
            yield f"  {'':<{names}}  asked for {value.asked}: {value.why}"
    for one in facts.unknown:
        yield f"  line {one.line}: nothing reads `{one.key}`"


def _shown(value: Value) -> str:
    found = value.value
    if isinstance(found, tuple):
        return ", ".join(map(str, found))
    if isinstance(found, float):
        return f"{found:g}"
    return "-" if found is None else str(found)
