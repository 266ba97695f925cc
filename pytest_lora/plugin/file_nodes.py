"""Files of strangers as nodes of pytest: under names that do nothing to it, to a terminal or to a log."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from pytest_lora.cleaning import file_id, printable
from pytest_lora.findings import Finding, LoraHealthWarning


def node_id(path: Path, root: Path, top: Path) -> str:
    """The path from the root of the session; outside of it, from the folder that was named on."""
    return _divided(path, root, top)[1]


def shown_path(path: Path, root: Path, top: Path) -> Path:
    """The path as its node id has it: what pytest prints as the place of an item."""
    start, named = _divided(path, root, top)
    return start / named


def _divided(path: Path, root: Path, top: Path) -> tuple[Path, str]:
    start = root if path.is_relative_to(root) else top.parent
    return start, "/".join(map(file_id, path.relative_to(start).parts)) or "."


def is_strict(finding: Finding, place: str) -> bool:
    """Warn of a finding at a place, and say whether a filter makes that an error."""
    try:
        warnings.warn_explicit(str(finding), LoraHealthWarning, place, finding.line or 1)
    except LoraHealthWarning:
        return True
    return False


class InAnyFolder:
    """A node whose file may lie where this user may not look: pytest asks there for a ``conftest.py``, and stops the
    session over what the system says. The hooks of the node around it are those of a folder that holds no code."""

    @property
    def ihook(self) -> Any:
        """The hooks of the node."""
        node: Any = self
        try:
            return node.session.gethookproxy(node.path)
        except OSError:
            return node.parent.ihook


def unread(shown: Path) -> str:
    """A path in brackets, for which Python shows no line beside a warning.

    Whatever is on that line would be printed as it is, and a pipe in the place of the file would be waited for.
    """
    return f"<{shown}>"


def place_of_warning(path: Path, shown: Path, most: int) -> str:
    """The path of a file of text, in brackets where one of its lines would do something in a log.

    Args:
        path: Of a regular file.
        shown: What pytest prints of the path.
        most: Characters that are looked at; a longer file is not shown.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(most + 1)
    except OSError:
        return unread(shown)
    return (
        str(path) if path == shown and len(text) <= most and printable(text, most) == text else unread(shown)
    )
