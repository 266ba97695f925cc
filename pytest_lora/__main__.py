"""``python -m pytest_lora check PATH...``: saved adapters and recipes where pytest is not the entry.

It calls pytest with the items of ``--lora-adapters`` and ``--lora-recipes``, and ends with its exit status.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from pytest_lora.arguments import hub_hint

ABOUT = """
Options of pytest and of its plugin pytest-lora may follow, with the equals sign where they have a value:
--lora-card=24GiB --lora-base=Qwen/Qwen2.5-0.5B --lora-report=findings.sarif -q. No conftest.py is imported, and the
addopts of an ini file do not count.

exit status: 0 all healthy, 1 errors were found, 2 interrupted, 4 wrong use, 5 nothing to check
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names.

    Returns:
        The exit status of pytest.
    """
    given, others = _parser().parse_known_args(arguments)
    for name in given.paths:
        if not os.path.exists(name):
            hint = hub_hint(name) or "; write the value of an option with the equals sign"
            print(f"ERROR: there is no file or folder {name!r}{hint}", file=sys.stderr)
            return int(pytest.ExitCode.USAGE_ERROR)
    wanted = [*_adapters(given.paths), *_recipes(given.paths, if_any=given.if_any)]
    if given.if_any and not wanted and not given.json:
        return int(pytest.ExitCode.OK)
    status = _printed(wanted + others) if given.json else _run(wanted + others)
    nothing = given.if_any and status == pytest.ExitCode.NO_TESTS_COLLECTED
    return int(pytest.ExitCode.OK if nothing else status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pytest_lora")
    check = parser.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="check saved adapters and recipes",
        description="Check saved adapters and recipes; nothing in them is executed, nothing is downloaded.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument(
        "paths", nargs="+", metavar="PATH", help="a folder, a file of a saved adapter, or a recipe"
    )
    check.add_argument(
        "--json", action="store_true", help="print the report as JSON; what pytest says goes to stderr"
    )
    check.add_argument(
        "--if-any",
        action="store_true",
        help="leave alone what is neither an adapter nor a recipe, and exit with 0 where nothing else is named",
    )
    return parser


def _adapters(paths: Iterable[str]) -> list[str]:
    """Folders that may hold adapters, none of them within another."""
    from pytest_lora.plugin.file_nodes import KNOWN_BY

    folders = {Path(p).parent if Path(p).name in KNOWN_BY else Path(p) for p in map(os.path.abspath, paths)}
    tops = [one for one in sorted(folders) if one.is_dir() and not folders & {*one.parents}]
    return [f"--lora-adapters={one}" for one in tops]


def _recipes(paths: Iterable[str], *, if_any: bool) -> list[str]:
    """Recipes, and folders that may hold some."""
    from pytest_lora.plugin.file_nodes import KNOWN_BY
    from pytest_lora.plugin.recipe_items import is_recipe

    places = dict.fromkeys(Path(p) for p in map(os.path.abspath, paths) if Path(p).name not in KNOWN_BY)
    return [
        f"--lora-recipes={one}"
        for one in places
        if not (if_any and one.is_file()) or is_recipe(one, named=False)
    ]


class _NothingElse:
    """Keeps pytest from collecting the tests of the folder that it is called in."""

    @pytest.hookimpl(wrapper=True)
    def pytest_cmdline_parse(self) -> Generator[None, pytest.Config, pytest.Config]:
        """Take the paths away that pytest has found itself."""
        config = yield
        config.args, config.args_source = [], config.ArgsSource.ARGS
        return config


def _run(options: list[str]) -> int:
    of_this_module = "ignore::pytest.PytestAssertRewriteWarning"  # it is loaded before pytest
    own = ["--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", "-W", of_this_module]
    return pytest.main([*own, *options], plugins=[_NothingElse()])


def _printed(options: list[str]) -> int:
    """Run, and print the report as JSON."""
    with tempfile.TemporaryDirectory(prefix="pytest-lora-") as folder:
        report = Path(folder, "report.json")
        with redirect_stdout(sys.stderr):
            status = _run([*options, f"--lora-report={report}"])
        if report.is_file():
            print(report.read_text("utf-8"), end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
