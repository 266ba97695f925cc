"""Rules: pure functions from facts to findings, one a file, found by their place in the tree.

Other packages add theirs through the entry point group ``pytest_lora.rules``, whose values name a module or a package
of modules, each with one function under ``@rule``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import ModuleType

from pytest_lora.expect import Expect
from pytest_lora.findings import Finding
from pytest_lora.rules.registry import Rule as Rule
from pytest_lora.rules.registry import RuleError as RuleError
from pytest_lora.rules.registry import Violation as Violation
from pytest_lora.rules.registry import is_own, registered
from pytest_lora.rules.registry import rule as rule
from pytest_lora.values import in_short

ENTRY_POINTS = "pytest_lora.rules"
"""Entry point group of packages that add rules of their own."""

_HOMES = {
    "curve_shape": "training",
    "optimizer": "training",
    "saved_config": "behaviour",
    "served": "checkpoint",
}
"""Modules of facts whose rules are in the folder of another name."""


def catalogue() -> tuple[Rule, ...]:
    """Every rule, ordered by code: those of this package, and those of others."""
    return _rules_at(None)


def rules_for(facts: type) -> tuple[Rule, ...]:
    """The rules that judge facts of this class, ordered by code; no others are loaded."""
    return tuple(rule for rule in _rules_at(_home(facts)) if issubclass(facts, rule.needs))


def _rules_at(home: str | None) -> tuple[Rule, ...]:
    """What is loaded once the rules of a folder are, ordered by code; all rules for None."""
    folders = _folders()
    wanted = folders if home is None else [home] if home in folders else []
    # Code that takes modules out of ``sys.modules`` again, as pytest's own pytester does, has rules and facts imported
    # anew: the packages of today decide, so that rules and facts are of one import.
    return _loaded(tuple(importlib.import_module(f"{__name__}.{folder}") for folder in wanted))


@cache
def _folders() -> list[str]:
    return [folder.name for folder in pkgutil.iter_modules(__path__) if folder.ispkg]


@cache
def _loaded(packages: tuple[ModuleType, ...]) -> tuple[Rule, ...]:
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    _load_others()
    return tuple(registered[code] for code in sorted(registered))


def number_of_rules(stage: str) -> int:
    """How many rules a stage has, of which none is loaded for that: one a file."""
    own = sum(1 for _ in pkgutil.iter_modules([f"{path}/{stage}" for path in __path__]))
    _load_others()
    foreign = (rule for rule in registered.values() if not is_own(rule.judge))
    return own + sum(rule.stage == stage for rule in foreign)


def _home(facts: type) -> str | None:
    """The folder of the rules on facts of this class; None where they may be anywhere."""
    package, _, module = facts.__module__.rpartition(".")
    return _HOMES.get(module, module) if package == "pytest_lora.facts" else None


@cache
def _load_others() -> None:
    """Load the rules of other packages."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            found = entry.load()
            for module in pkgutil.walk_packages(getattr(found, "__path__", ()), f"{found.__name__}."):
                importlib.import_module(module.name)
        except (Exception, SystemExit) as error:
            raise RuleError(
                f"the rules of {entry.name} = {entry.value} (entry point group {ENTRY_POINTS}) cannot be loaded: "
                f"{type(error).__name__}: {in_short(error)}; mend that package, or uninstall it"
            ) from error


def judge(
    facts: Iterable[object], expect: Expect, *, where: Callable[[Rule], bool] | None = None
) -> Iterator[Finding]:
    """Yield what every rule that needs one of these facts has to say about them.

    Args:
        facts: What was seen.
        expect: What is meant.
        where: Which rules to ask; all by default.

    Raises:
        LookupError: No rule needs one of the facts, so that nothing would have been judged.
    """
    for fact in facts:
        fitting = rules_for(type(fact))
        if not fitting:
            raise LookupError(f"no rule judges {type(fact).__name__}; its module was imported twice")
        for known in fitting:
            if where is None or where(known):
                yield from known(fact, expect)


def without_consequences(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings less those that an error among them explains, so that one mistake is told once."""
    told = tuple(findings)
    causes = {finding.rule for finding in told if finding.severity == "error"}
    said = {finding.code for finding in told}
    known = registered if said <= registered.keys() else {rule.code: rule for rule in catalogue()}
    explained = {code for code in said & known.keys() if not causes.isdisjoint(known[code].because_of)}
    return tuple(finding for finding in told if finding.by_itself or finding.code not in explained)


def find(wanted: str) -> Rule | None:
    """The rule with this code, present or former, or this name; None where there is none."""
    asked = wanted.lower().replace("-", "_").replace(" ", "_")
    known = {key.lower(): rule for rule in catalogue() for key in (*rule.codes, rule.name)}
    return known.get(asked)


def code_of(name: str) -> str:
    """The code of the rule of this name.

    Raises:
        LookupError: There is no such rule.
    """
    for known in catalogue():
        if known.name == name:
            return known.code
    raise LookupError(f"there is no rule named {name!r}")
