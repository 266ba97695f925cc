"""The ways that a fix offers, each as a function from the script with the fault to the script with the fix.

What a finding hands over as changes of settings is taken from there; code is read from the words that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pytest_lora import Finding
from pytest_lora.rules import catalogue
from tests.rules.remedies.recipe_lines import edits, mended_recipe
from tests.rules.remedies.script import mended
from tests.rules.remedies.words import alternatives, setting

RECIPES = {known.code for known in catalogue() if known.stage == "recipe"}


def offered(finding: Finding) -> list[Callable[[str], str | None]]:
    """Each way; the script that it returns is None where the way is about nothing in the script."""
    if finding.code in RECIPES:
        return [partial(mended_recipe, way=way, line=finding.line) for way in edits(finding.fix)]
    words = finding.fix
    for change in finding.changes:
        words = words.replace(change.said, "", 1)
    ways = [[setting(name, value) for name, value in change.settings.items()] for change in finding.changes]
    return [partial(mended, steps=way) for way in (*ways, *alternatives(words))]
