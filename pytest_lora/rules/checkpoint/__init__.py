"""Rules on saved adapters (codes 4xx), and the groups that they are shown in."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_lora.findings import Finding

GROUPS = {
    "files": ("LORA40",),
    "config": ("LORA41",),
    "keys": ("LORA42",),
    "shapes": ("LORA43",),
    "values": ("LORA44",),
    "base": ("LORA45",),
    "serving": ("LORA46",),
}
"""Parts of a saved adapter, each a test item, and how the codes begin that are about it."""


def group_of(code: str) -> str:
    """The part of a saved adapter that a rule is about: ``"config"`` for those on configurations and of others."""
    return next((name for name, starts in GROUPS.items() if code.startswith(starts)), "config")


def lacks_configuration(findings: Iterable[Finding]) -> bool:
    """Whether the folder has no configuration, so that whatever else is in it is no adapter."""
    return any(finding.rule == "config_is_missing" for finding in findings)
