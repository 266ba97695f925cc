"""Files of strangers as nodes of pytest: under names that do nothing to it or to a log, and what they tell."""

from __future__ import annotations

import linecache
import os
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.findings import Finding, LoraHealthWarning, Report
from pytest_lora.plugin.options import ADAPTER_FILES
from pytest_lora.values import LONGEST_OF_A_FINDING, file_id, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

KNOWN_BY = (*ADAPTER_FILES, "adapter_model.bin", "pytorch_lora_weights.safetensors")
"""Files that make a folder one with an adapter; the first that is there gives the items their names."""

CODE = ("conftest.py", "__init__.py")
"""Files beside an argument that pytest itself imports."""

SHOWN_SOURCE = 100
"""Characters of a line of a file that pytest prints under a warning; a saved configuration may be one line."""

_HEADS = ("  --> ", "  observed: ", "  expected: ", "  fix:      ")
"""How the lines of a finding begin; what is too long goes on under what is said after that."""


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


def may_be_recipe(name: str) -> bool:
    """Whether a file of this name is one to look into for a recipe."""
    from pytest_lora.inspection.recipe import SUFFIXES

    return name not in ADAPTER_FILES and name.endswith(SUFFIXES)


def named_adapters(config: pytest.Config, folders: Iterable[Path]) -> frozenset[Path]:
    """The files of adapters in these folders that the command line names."""
    return frozenset(file for file in _named_files(config, folders) if file.name in KNOWN_BY)


def named_recipes(config: pytest.Config, places: Iterable[Path]) -> frozenset[Path]:
    """The files in these places that the command line names, as far as they may be recipes."""
    places = tuple(places)
    return frozenset(
        file for file in _named_files(config, places) if file in places or may_be_recipe(file.name)
    )


def _named_files(config: pytest.Config, tops: Iterable[Path]) -> frozenset[Path]:
    """The files in these folders that the command line names, by path or by node id, and no folder above them.

    Ids of what lies outside of the root, or has an escape in its name, are no paths; such an argument becomes one.
    """
    if config.args_source is not config.ArgsSource.ARGS:
        return frozenset()
    home, tops = config.invocation_params.dir, tuple(tops)
    for number, arg in enumerate(config.args):
        path, colons, names = arg.partition("::")
        if colons and not os.path.lexists(home / path):
            found = next(filter(None, (_path_of(path, config.rootpath, top) for top in tops)), None)
            config.args[number] = f"{found}{colons}{names}" if found else arg
    given = [Path(os.path.realpath(home / arg.partition("::")[0])) for arg in config.args]
    folders = {path for path in given if os.path.isdir(path)}
    return frozenset(
        path
        for path in given
        if os.path.isfile(path)
        and folders.isdisjoint(path.parents)
        and any(path.is_relative_to(top) for top in tops)
    )


def _path_of(identifier: str, root: Path, top: Path) -> Path | None:
    """The path in a folder of which this is the node id, if there is one."""
    path = root if top.is_relative_to(root) else top.parent
    for part in identifier.split("/"):
        try:
            names = os.listdir(path)
        except OSError:
            return None
        name = next((name for name in names if file_id(name) == part), None)
        if name is None:
            return None
        path /= name
    return path if path.is_relative_to(top) else None


def refuse_code_beside(path: Path, flag: str, checked: str) -> None:
    """Stop before pytest imports code that lies beside a file named on the command line.

    Args:
        path: The file.
        flag: What names it without running anything.
        checked: What that then checks, in words.

    Raises:
        pytest.UsageError: There is such code.
    """
    for name in CODE:
        if os.path.lexists(path.parent / name):
            import pytest

            raise pytest.UsageError(
                printable(
                    f"{path.parent / name} lies beside {path.name}, and pytest would run it; {flag} checks "
                    f"{checked} and runs nothing"
                )
            )


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


def deliver(report: Report, place: str) -> None:
    """Hand a report in, warn of its warnings at a place, and raise if it has errors.

    Args:
        report: What was found.
        place: Path of a file whose lines pytest may show under a warning, or anything in brackets.

    Raises:
        LoraHealthError: There are errors, or warnings in a session that is strict.
        LoraHealthWarning: There are warnings, and a filter makes them errors.
    """
    from pytest_lora.assertions import LoraHealthError, delivered  # not where no item is judged
    from pytest_lora.rules.selection import in_force

    delivered.append(report)
    if report.warnings and not place.startswith("<"):
        _cut_lines(place)
    strict = [str(finding) for finding in report.warnings if is_strict(finding, place)]
    if not report.ok or (in_force().strict and report.warnings):
        raise LoraHealthError(report)
    if strict:
        raise LoraHealthWarning("\n\n".join(strict))


def _cut_lines(file: str) -> None:
    """Let Python, which prints the line under a warning, know of a file no more than the beginnings of its lines."""
    known = linecache.getlines(file)
    lines = [line if len(line) <= SHOWN_SOURCE else f"{line[:SHOWN_SOURCE].rstrip()} ...\n" for line in known]
    linecache.cache[file] = (sum(map(len, lines)), None, lines, file)


def failure_text(excinfo: pytest.ExceptionInfo[BaseException], config: pytest.Config) -> str | None:
    """The report alone, no wider than the terminal, where that is what failed."""
    from pytest_lora.assertions import LoraHealthError

    if not isinstance(excinfo.value, (LoraHealthError, LoraHealthWarning, ValueError)):
        return None
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    width = 80 if terminal is None else terminal._tw.fullwidth
    return "\n".join(wrapped(printable(str(excinfo.value), LONGEST_OF_A_FINDING), width))


def wrapped(text: str, width: int) -> Iterator[str]:
    """The lines of a report, of which those that are too long go on under what they say.

    A word is never broken, and neither is code between backticks, which somebody may copy.
    """
    for line in text.splitlines():
        if len(line) <= width:
            yield line
            continue
        kept = "`".join(
            part.replace(" ", "\0") if number % 2 else part for number, part in enumerate(line.split("`"))
        )
        further = " " * next((len(head) for head in _HEADS if line.startswith(head)), 2)
        parts = textwrap.wrap(
            kept, width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
        )
        first = len(line) - len(line.lstrip())
        for number, part in enumerate(parts):
            yield (line[:first] + part.lstrip() if number == 0 else part).replace("\0", " ")
