"""Pages of the site that are made from the code when it is built, so that none of them can go stale.

The home page is README.md. Options, markers and fixtures come from their tables, the API from docstrings, and each rule
has a page, its docstring. Files of the repository that pages link to are put on the site too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

import pytest_lora
from pytest_lora.bases.examples import runnable
from pytest_lora.plugin import fixtures
from pytest_lora.plugin.options import MARKERS, TABLE
from pytest_lora.rules import Rule, catalogue

ROOT = Path(__file__).parent.parent
STAGES = {
    "config": "Configuration (LORA1xx)",
    "model": "Model (LORA2xx)",
    "training": "Training (LORA3xx)",
    "history": "Logged losses (LORA34x)",
    "checkpoint": "Saved adapters (LORA4xx)",
    "memory": "Memory (LORA5xx)",
    "recipe": "Recipes (LORA6xx)",
    "behaviour": "Behaviour (LORA9xx)",
    "sweep": "Rank sweeps (LORA94x)",
}
ALSO_PUBLIC = {
    "findings": ("Severity",),
    "strategies.lifecycle": ("LoraLifecycle",),
    "strategies": (
        "adapter_folders",
        "lora_configs",
        "lora_models",
        "misconfigured_lora_configs",
        "training_shapes",
    ),
    "bases.tiny": ("load_tiny", "random_tiny"),
    "runs.watch": ("Watch",),
}
"""Public names that are imported from their own module."""

_LINK = re.compile(r"\]\(((?!https?:|#|mailto:)[^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Put the made pages in the navigation, where it names their folder."""
    lists = {"reference/api": api_nav(), "reference/rules": rules_nav()}
    for section in config.nav:
        for entry in next(iter(section.values())) if isinstance(next(iter(section.values())), list) else ():
            for title, target in entry.items():
                entry[title] = lists.get(target, target) if isinstance(target, str) else target
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages, and the files that pages link to."""
    pages = {"index.md": (ROOT / "README.md").read_text(), **dict(made_pages())}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    sources = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for target in {target for uri, text in sources.items() for target in linked_files(uri, text)}:
        file = File.generated(config, site_uri(target), content=as_page(target))
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links into the repository lead to where the site has that file."""
    return site_links(page.file.src_uri, markdown)


def made_pages() -> Iterator[tuple[str, str]]:
    """Every made page but the home page: its place and its text."""
    yield "reference/options.md", options_page()
    yield "reference/rules/index.md", rules_index()
    yield "reference/rules/how_often.md", how_often()
    for rule in catalogue():
        yield f"reference/rules/{rule.code}.md", rule_page(rule)
    for module, names in public_names().items():
        yield f"reference/api/{module}.md", api_page(module, names)


def options_page() -> str:
    """Options, ini values, markers and fixtures, each from the one place that declares it."""
    lines = [
        "# Options, markers, fixtures",
        "",
        "## Options",
        "",
        "| command line | ini | |",
        "| --- | --- | --- |",
    ]
    for option in TABLE:
        value = (option.flag or {}).get("metavar")
        flag = f"`--lora-{option.name}{f'={value}' if value else ''}`" if option.flag is not None else ""
        ini = f"`lora_{option.name}`" if option.ini is not None else ""
        lines.append(f"| {flag} | {ini} | {option.text} |")
    lines += ["", "## Markers", "", "| | |", "| --- | --- |"]
    for marker in MARKERS:
        signature, _, text = marker.partition(": ")
        lines.append(f"| `@pytest.mark.{signature}` | {text} |")
    lines += ["", "## Fixtures", "", "Any of them can be overridden, at any level.", ""]
    for name, text in fixture_docs():
        lines += [f"### `{name}`", "", text, ""]
    return "\n".join(lines)


def fixture_docs() -> Iterator[tuple[str, str]]:
    """Name and docstring of each public fixture."""
    for node in ast.parse(Path(fixtures.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) or ""


def rules_index() -> str:
    """All rules, by stage."""
    lines = [
        "# Rules",
        "",
        "Errors fail an assertion, warnings become `LoraHealthWarning`, infos are in the report only. The example of "
        "each page is executed by the tests: it fires that rule and no other, and the mended form none.",
    ]
    for stage, title in STAGES.items():
        lines += ["", f"## {title}", "", "| code | severity | name | |", "| --- | --- | --- | --- |"]
        for rule in of_stage(stage):
            lines.append(
                f"| [{rule.code}]({rule.code}.md) | {rule.severity} | {title_of(rule)} | {rule.summary} |"
            )
    return "\n".join([*lines, ""])


def how_often() -> str:
    """The rules that fire on published recipes, the most frequent first, from the figures of the benchmark."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "public_recipes.json").read_text())
    sample, known = figures["sample"], {rule.code: rule for rule in catalogue()}
    judged = sum(entry["judged"] for entry in sample)
    files = sum(entry["files"] for entry in sample)
    loud = sum(entry["with_errors_or_warnings"] for entry in sample)
    lines = [
        "# How often rules fire",
        "",
        f"On the {judged} recipes with LoRA among the {files} YAML files that these tools publish as examples. {loud} "
        "of them have an error or a warning. No GPU was named, so memory was not judged, and a base without a known "
        "shape is judged by less. Examples of tools are read by many: yours may differ. Rules that are not listed "
        "fired on none.",
        "",
        "| repository | commit | files | judged | with an error or a warning |",
        "| --- | --- | ---: | ---: | ---: |",
        *(
            f"| {entry['repository']} | {entry['commit']} | {entry['files']} | {entry['judged']} "
            f"| {entry['with_errors_or_warnings']} |"
            for entry in sample
        ),
        "",
        "| rule | | severity | recipes | share |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for entry in figures["rules"]:
        rule, severities = known[entry["code"]], ", ".join(entry["severities"])
        share = f"{entry['files'] / judged:.1%}"
        lines.append(
            f"| [{rule.code}]({rule.code}.md) | {rule.summary} | {severities} | {entry['files']} | {share} |"
        )
    link = "[public_recipes.py](../../../benchmarks/public_recipes.py)"
    return "\n".join([*lines, "", f"Measured by {link}.", ""])


def rule_page(rule: Rule) -> str:
    """The docstring of a rule under its code, name and severity."""
    return f"# {rule.code} {title_of(rule)}\n\n*{rule.severity}, `{rule.name}`*\n\n{runnable(rule.doc)}\n"


def rules_nav() -> list[Any]:
    """The rules in the navigation: a section for each stage."""
    stages = [
        {title: [{f"{r.code} {title_of(r)}": f"reference/rules/{r.code}.md"} for r in of_stage(stage)]}
        for stage, title in STAGES.items()
    ]
    return ["reference/rules/index.md", {"How often they fire": "reference/rules/how_often.md"}, *stages]


def of_stage(stage: str) -> Iterator[Rule]:
    """The rules of a stage, ordered by code."""
    return (rule for rule in catalogue() if rule.stage == stage)


def title_of(rule: Rule) -> str:
    """The name of a rule as words."""
    return rule.name.replace("_", " ")


def public_names() -> dict[str, list[str]]:
    """Public names by the module that has them."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, module in pytest_lora._homes().items():
        names[module.removeprefix("pytest_lora.")].append(name)
    for module, others in ALSO_PUBLIC.items():
        names[module] += others
    return dict(sorted(names.items()))


def api_page(module: str, names: list[str]) -> str:
    """The public names of one module, from their docstrings."""
    where = "pytest_lora" if any(name in pytest_lora.__all__ for name in names) else f"pytest_lora.{module}"
    # What a user calls comes first; the classes that it returns follow.
    ordered = sorted(names, key=lambda name: name[0].isupper())
    entries = [
        assertion(name) if name.startswith("assert_") else documented(module, name) for name in ordered
    ]
    return "\n\n".join([f"# {api_title(module)}", f"`from {where} import ...`", *entries, ""])


def documented(module: str, name: str) -> str:
    """A public name, by its docstring; without its signature where only this package makes one."""
    found = getattr(importlib.import_module(f"pytest_lora.{module}"), name)
    private = any(field.startswith("_") for field in getattr(found, "__dataclass_fields__", ()))
    options = "\n    options:\n      merge_init_into_class: false" if private else ""
    return f"::: pytest_lora.{module}.{name}{options}"


def assertion(name: str) -> str:
    """An assertion, by the check that it raises for."""
    check = inspect.unwrap(getattr(pytest_lora, name)).__name__
    home = pytest_lora._homes()[check]
    text = f"""
Raises `LoraHealthError` where [`{check}`][{home}.{check}] finds errors. It takes the same arguments in the same order
and returns the same report; warnings become `LoraHealthWarning`."""
    return f"## `{name}`\n{text}"


def api_title(module: str) -> str:
    """The module as words."""
    return module.replace(".", ": ").replace("_", " ").capitalize()


def api_nav() -> list[Any]:
    """The pages of the API in the navigation."""
    return [{api_title(module): f"reference/api/{module}.md"} for module in public_names()]


def linked_files(uri: str, text: str) -> Iterator[str]:
    """Files and folders of the repository that a page links to and that are no pages, relative to its root."""
    for match in _LINK.finditer(text):
        target = _in_repository(uri, match[1])
        if target and not _is_page(target):
            yield target


def site_links(uri: str, text: str) -> str:
    """The text of a page with its links into the repository made links of the site."""

    def moved(match: re.Match[str]) -> str:
        target = _in_repository(uri, match[1])
        if target is None:
            return match[0]
        place = "index.md" if target == "README.md" else target.removeprefix("docs/")
        if not _is_page(target):
            place = site_uri(target)
        return f"]({os.path.relpath(place, Path(uri).parent)}{match[2] or ''})"

    return _LINK.sub(moved, text)


def _in_repository(uri: str, link: str) -> str | None:
    """What a link leads to, relative to the root of the repository; ``None`` for a link to a made page."""
    home = ROOT if uri == "index.md" else (ROOT / "docs" / uri).parent
    target = Path(os.path.normpath(home / link))
    return target.relative_to(ROOT).as_posix() if target.exists() else None


def _is_page(target: str) -> bool:
    """Whether the site has it anyway: the home page, pages and pictures."""
    return target == "README.md" or (target.startswith("docs/") and target.endswith((".md", ".png", ".svg")))


def site_uri(target: str) -> str:
    """Where the site has a file or folder of the repository."""
    return f"repository/{target}" if target.endswith(".json") else f"repository/{target}.md"


def as_page(target: str) -> str:
    """A file of the repository as a page; of a folder the names in it; JSON as it is."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.name != "__pycache__")
        return "\n".join([f"# {target}", "", *(f"- `{name}`" for name in names), ""])
    text = path.read_text()
    if target.endswith(".json"):
        return text
    kind = {".py": "python", ".yml": "yaml"}.get(path.suffix, "text")
    return f'# {target}\n\n````{kind} title="{target}"\n{text}\n````\n'
