"""Recipes as test items, one a recipe; imported only where a session names recipes.

Collecting reads the files as YAML and nothing else. What is no recipe for a LoRA adapter is counted and left alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.plugin.file_nodes import (
    InAnyFolder,
    deliver,
    failure_text,
    may_be_recipe,
    named_recipes,
    node_id,
    place_of_warning,
    refuse_code_beside,
    shown_path,
)
from pytest_lora.plugin.session_options import options_of
from pytest_lora.values import file_id

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

ITEM = "recipe"
"""Name of the item of a recipe."""

MAX_DEPTH = 16
"""Folders within folders that are searched."""

PROGRESS_FROM = 10
"""Files from which a line says how far collecting has come."""


def enable(config: pytest.Config, places: tuple[Path, ...]) -> None:
    """Collect the recipes of a session."""
    config.pluginmanager.register(Recipes(config, places), "lora-recipe-items")


def refuse_code_beside_recipes(args: Sequence[str]) -> None:
    """Stop before pytest imports code that lies beside a recipe named on the command line.

    Raises:
        pytest.UsageError: There is such code.
    """
    for path, _, name in (arg.partition("::") for arg in args):
        if name == ITEM:
            refuse_code_beside(Path(path), f"--lora-recipes={path}", "the recipe")


class Recipes:
    """The hooks of a session with recipes."""

    def __init__(self, config: pytest.Config, places: tuple[Path, ...]) -> None:
        self.config, self.places = config, places
        self.named = named_recipes(config, places)
        self.files = self.recipes = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Put the recipes beside what is named on the command line."""
        report = yield
        if isinstance(collector, pytest.Session) and report.passed:
            whole = [place for place in self.places if not self._named_in(place)]
            report.result = [*report.result, *(self._place(collector, place) for place in whole)]
        return report

    def _named_in(self, place: Path) -> bool:
        return any(file.is_relative_to(place) for file in self.named)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Take folders of recipes out of pytest's hands, which would import a conftest.py among them."""
        if path not in self.places or self._named_in(path):
            return None
        nothing: pytest.Collector = Nothing.from_parent(parent, name=path.name, path=path)
        return nothing

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Collect a recipe that is named on the command line."""
        file = file_path.resolve() if parent.session.isinitpath(file_path) else file_path
        if file not in self.named:
            return None
        top = next(place for place in self.places if file.is_relative_to(place))
        recipe: pytest.Collector = RecipeFile.from_parent(
            parent, path=file_path, nodeid=node_id(file, self.config.rootpath, top), recipes=self, top=top
        )
        return recipe

    def _place(self, session: pytest.Session, place: Path) -> pytest.Collector:
        collector: pytest.Collector = RecipePlace.from_parent(
            session,
            name=file_id(place.name),
            path=place,
            nodeid=node_id(place, self.config.rootpath, place),
            recipes=self,
        )
        return collector

    def pytest_report_collectionfinish(self) -> str | None:
        """Say how many of the files are recipes."""
        if not self.files:
            return None
        return f"{self.recipes} of {self.files} files are LoRA recipes"

    def items(self, parent: RecipePlace) -> Iterator[pytest.Item]:
        """The recipes of a folder, or the one that is named."""
        files = sorted(_files(parent.path))
        told = PROGRESS_FROM
        for number, file in enumerate(files, 1):
            self.files += 1
            if number == told and len(files) > PROGRESS_FROM:
                told = self._progress(number, len(files))
            if is_recipe(file, named=file == parent.path):
                yield self.item(file, parent, parent.path)

    def item(self, file: Path, parent: pytest.Collector, top: Path) -> pytest.Item:
        """The item of a recipe in a folder that was named."""
        self.recipes += 1
        start = self.config.rootpath, top
        item = RecipeItem.from_parent(parent, name=ITEM, path=file, nodeid=f"{node_id(file, *start)}::{ITEM}")
        item.shown = shown_path(file, *start)
        return item

    def _progress(self, number: int, files: int) -> int:
        """Say how far it is; on a terminal in one line, elsewhere ever more rarely.

        Returns:
            The file with which it is said again.
        """
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or terminal.verbosity < 0:
            return 0
        text = f"recipes: {number} of {files} files"
        if terminal.isatty:
            terminal.rewrite(text, bold=True, erase=True)
            return number + PROGRESS_FROM
        terminal.ensure_newline()
        terminal.write_line(text)
        return 2 * number


class RecipePlace(InAnyFolder, pytest.Collector):
    """A folder of recipes, or one recipe; no ``pytest.Directory``, for which pytest would import a conftest.py."""

    def __init__(self, *, recipes: Recipes, path: Path, **others: Any) -> None:
        super().__init__(path=path, **others)
        self.recipes = recipes

    def collect(self) -> Iterator[pytest.Item]:
        """Yield an item for each recipe."""
        return self.recipes.items(self)


class RecipeFile(InAnyFolder, pytest.File):
    """A recipe that is named on the command line."""

    def __init__(self, *, recipes: Recipes, top: Path, **others: Any) -> None:
        super().__init__(**others)
        self.recipes, self.top = recipes, top

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the item, unless the file is YAML and no recipe."""
        self.recipes.files += 1
        if is_recipe(self.path, named=True):
            yield self.recipes.item(self.path.resolve(), self, self.top)


class Nothing(InAnyFolder, pytest.Collector):
    """What stands in the place of a folder of recipes where pytest comes across it: it is collected elsewhere."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield nothing."""
        return iter(())


class RecipeItem(InAnyFolder, pytest.Item):
    """One recipe."""

    shown: Path
    """Its path, as pytest prints it."""

    def runtest(self) -> None:
        """Judge the recipe.

        Raises:
            LoraHealthError: There are errors.
            LoraHealthWarning: There are warnings, and a filter makes them errors.
        """
        from pytest_lora.checks.recipe import check_recipe
        from pytest_lora.inspection.quiet import quiet_libraries
        from pytest_lora.inspection.recipe.yaml_file import MAX_BYTES
        from pytest_lora.plugin import markers

        options = options_of(self.config)
        cards, memory = options.card
        with quiet_libraries():
            report = check_recipe(
                self.path,
                base=options.base,
                budget=memory,
                gpus=cards,
                expect=markers.expect_for(self),
            )
        deliver(report, place_of_warning(self.path, self.shown, MAX_BYTES) if report.warnings else "")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The report alone, where that is what failed."""
        return failure_text(excinfo, self.config) or super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the item is, and its name in headings."""
        return self.shown, None, self.shown.name


def _files(place: Path, depth: int = 0) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    try:
        with os.scandir(place) as found:
            entries = sorted(found, key=lambda one: one.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if depth < MAX_DEPTH and not entry.name.startswith("."):
                yield from _files(place / entry.name, depth + 1)
        elif may_be_recipe(entry.name) and entry.is_file(follow_symlinks=False):
            yield place / entry.name


def is_recipe(file: Path, *, named: bool) -> bool:
    """Whether a file is a recipe for an adapter, or would be one if it were YAML."""
    from pytest_lora.inspection.recipe import is_likely, recipe_facts

    if file.suffix == ".json" and not (named or is_likely(file)):
        return False
    facts = recipe_facts(file)
    if facts.flaw is not None:
        return named or is_likely(file)
    return facts.setting is not None
