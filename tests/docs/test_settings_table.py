"""docs/memory_budget.md has a line for each setting of a step, with its default."""

from __future__ import annotations

import inspect
import re

from pytest_lora import estimate_memory
from tests.docs.blocks import ROOT


def test_every_setting_has_its_line() -> None:
    text = (ROOT / "docs" / "memory_budget.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \| \S.* \|$", text, flags=re.MULTILINE))
    parameters = inspect.signature(estimate_memory).parameters
    wanted = {name: repr(parameters[name].default) for name in parameters if name not in ("config", "base")}
    assert shown == wanted, (
        "docs/memory_budget.md: write a line | `setting` | `default` | what it is | for each"
    )
