"""Saved adapters as test items, one a group of rules; imported only where a session names adapters.

Collecting looks at names in folders and at nothing else. Our own nodes stand in the place of pytest's folders, so that
no conftest.py, no __init__.py and no test file among the adapters is imported.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.plugin.file_nodes import (
    KNOWN_BY,
    InAnyFolder,
    deliver,
    failure_text,
    named_adapters,
    node_id,
    refuse_code_beside,
    shown_path,
    unread,
)
from pytest_lora.plugin.options import ADAPTER_FILES
from pytest_lora.plugin.session_options import options_of
from pytest_lora.rules.checkpoint import GROUPS, group_of, lacks_configuration
from pytest_lora.values import file_id

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from pytest_lora.findings import Report
    from pytest_lora.inspection.checkpoint.fit import Base

MAX_DEPTH = 32
"""Folders within folders that are searched."""

KEPT = 8
"""Reports that are kept for the other items of their adapters; xdist may run these in turns."""


def enable(config: pytest.Config, folders: tuple[Path, ...]) -> None:
    """Collect the adapters of a session.

    Raises:
        pytest.UsageError: pytest took its settings from a file among the adapters.
    """
    for folder in folders:
        _refuse_settings_in(folder, config)
    config.pluginmanager.register(Adapters(config, folders), "lora-adapter-items")


def _refuse_settings_in(folder: Path, config: pytest.Config) -> None:
    """Stop at an ini file of the adapters, unless pytest was called among them.

    Before pytest knows our option it takes a word that stands alone, as in ``--lora-adapters DIR``, for a path of
    tests, and looks for an ini file there; such a file can make it import anything.
    """
    ini, called = config.inipath, config.invocation_params.dir.resolve()
    if ini is not None and ini.resolve().is_relative_to(folder) and not called.is_relative_to(folder):
        raise pytest.UsageError(
            f"pytest took its settings from {ini}, which lies among the adapters; write --lora-adapters=DIR, "
            "with the equals sign, and give --rootdir if need be"
        )


def in_folders(session: pytest.Session, folders: Iterable[str]) -> Iterator[pytest.Item]:
    """The items of adapters in folders that are named on the command line and hold no test."""
    config = session.config
    known: Adapters | None = config.pluginmanager.get_plugin("lora-adapter-items")
    places = [Path(folder).resolve() for folder in folders]
    adapters = Adapters(config, tuple(places))
    for place in places:
        if known is None or not any(place.is_relative_to(folder) for folder in known.folders):
            yield from session.genitems(adapters.directory(place, session))


def refuse_code_beside_adapters(args: Sequence[str]) -> None:
    """Stop before pytest imports code that lies beside an adapter named on the command line.

    Raises:
        pytest.UsageError: There is such code.
    """
    for arg in args:
        path = Path(arg.partition("::")[0])
        if path.name in KNOWN_BY:
            refuse_code_beside(path, f"--lora-adapters={path.parent}", "the adapter")


class Adapters:
    """The hooks of a session with adapters, and what its items share."""

    def __init__(self, config: pytest.Config, folders: tuple[Path, ...]) -> None:
        self.config = config
        self.folders = frozenset(folders)
        self._named = named_adapters(config, folders)
        self._base: Base | None = None
        self._reports: OrderedDict[Path, Report] = OrderedDict()

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Put the folders beside what is named on the command line.

        As further arguments they would not do: of overlapping ones pytest 8 drops tests.
        """
        report = yield
        if isinstance(collector, pytest.Session) and report.passed:
            report.result = [*report.result, *self._unnamed(collector)]
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Take the folders of adapters out of pytest's hands."""
        if path not in self.folders:
            return None
        named = parent.session.isinitpath(path, with_parents=True)
        return self.directory(path, parent, AdapterDirectory if named else Nothing)

    def _unnamed(self, session: pytest.Session) -> Iterator[pytest.Collector]:
        for folder in sorted(self.folders):
            named = session.isinitpath(folder) or any(one.is_relative_to(folder) for one in self._named)
            if not named:
                yield self.directory(folder, session)

    def directory(
        self, path: Path, parent: pytest.Collector, kind: type[AdapterDirectory] | None = None
    ) -> pytest.Collector:
        """A folder of adapters as a node."""
        return (kind or AdapterDirectory).from_parent(
            parent,
            name=file_id(path.name),
            path=path,
            nodeid=node_id(path, *self.start_of(path)),
            adapters=self,
        )

    def start_of(self, path: Path) -> tuple[Path, Path]:
        """The root of the session, and the folder of adapters that a path is in."""
        top = next((folder for folder in (path, *path.parents) if folder in self.folders), path.parent)
        return self.config.rootpath, top

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Collect an adapter that is named on the command line."""
        if file_path.name not in ADAPTER_FILES or not parent.session.isinitpath(file_path):
            return None
        adapter: pytest.Collector = Adapter.from_parent(
            parent, path=file_path, nodeid=node_id(file_path, *self.start_of(file_path)), adapters=self
        )
        return adapter

    def report(self, item: AdapterItem) -> Report:
        """The whole report on the adapter of an item.

        Raises:
            ValueError: The base cannot be built, or an ini field has a wrong value.
        """
        folder = item.path.parent
        found = self._reports.get(folder)
        if found is None:
            found = self._reports[folder] = self._judged(item, folder)
            if len(self._reports) > KEPT:
                self._reports.popitem(last=False)
        return found

    def _judged(self, item: AdapterItem, folder: Path) -> Report:
        from pytest_lora.checks.checkpoint import checkpoint_base, judge_checkpoint
        from pytest_lora.inspection.quiet import quiet_libraries
        from pytest_lora.plugin import markers

        path = options_of(self.config).base
        # Without a base transformers may not be needed, and its older versions import torch.
        with warnings.catch_warnings(action="ignore") if path is None else quiet_libraries():
            if path is not None and self._base is None:
                self._base = checkpoint_base(path)
            return judge_checkpoint(folder, self._base, markers.expect_for(item))


class AdapterDirectory(InAnyFolder, pytest.Collector):
    """A folder of adapters; no ``pytest.Directory``, for which pytest would import a conftest.py."""

    def __init__(self, *, adapters: Adapters, path: Path, depth: int = 0, **others: Any) -> None:
        super().__init__(path=path, **others)
        self.adapters, self.depth = adapters, depth

    def collect(self) -> Iterator[pytest.Collector]:
        """Yield the adapter in this folder, and the folders in it."""
        folders: list[str] = []
        files: set[str] = set()
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name in KNOWN_BY:
                        files.add(entry.name)
                    elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
        except OSError:
            files.add(KNOWN_BY[0])  # the item says that the folder cannot be listed
        known_by = next((name for name in KNOWN_BY if name in files), None)
        if known_by is not None:
            yield self._child(Adapter, known_by)
        for name in sorted(folders) if self.depth < MAX_DEPTH else ():
            yield self._child(AdapterDirectory, name, depth=self.depth + 1)

    def _child(self, kind: type[pytest.Collector], name: str, **others: Any) -> pytest.Collector:
        child: pytest.Collector = kind.from_parent(
            self,
            name=file_id(name),
            path=self.path / name,
            nodeid=f"{self.nodeid}/{file_id(name)}".removeprefix("./"),
            adapters=self.adapters,
            **others,
        )
        return child


class Nothing(AdapterDirectory):
    """What stands in the place of a folder of adapters where pytest comes across it: it is collected elsewhere."""

    def collect(self) -> Iterator[pytest.Collector]:
        """Yield nothing."""
        return iter(())


class Adapter(InAnyFolder, pytest.File):
    """One saved adapter."""

    def __init__(self, *, adapters: Adapters, **others: Any) -> None:
        super().__init__(**others)
        self.adapters = adapters

    def collect(self) -> Iterator[pytest.Item]:
        """Yield an item for each group of rules; for those on servers only where one is named."""
        served = "serve" in options_of(self.config).fields
        for group in GROUPS:
            if group == "serving" and not served:
                continue
            yield AdapterItem.from_parent(self, name=group, adapters=self.adapters)


class AdapterItem(InAnyFolder, pytest.Item):
    """One group of rules on one adapter."""

    def __init__(self, *, adapters: Adapters, **others: Any) -> None:
        super().__init__(**others)
        self.adapters = adapters

    def runtest(self) -> None:
        """Judge the adapter.

        Raises:
            LoraHealthError: There are errors in this group.
            LoraHealthWarning: There are warnings, and a filter makes them errors.
        """
        whole = self.adapters.report(self)
        findings = [f for f in whole.findings if group_of(f.code) == self.name]
        if not findings and lacks_configuration(whole.findings):
            pytest.skip("not judged: without a configuration there is no adapter that could be healthy")
        deliver(whole.with_findings(findings), unread(self.reportinfo()[0]))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The report alone, where that is what failed."""
        return failure_text(excinfo, self.config) or super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the item is, and its name in headings."""
        path = shown_path(self.path, *self.adapters.start_of(self.path))
        return path, None, f"{path.parent.name}: {self.name}"
