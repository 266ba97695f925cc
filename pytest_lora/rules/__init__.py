"""Rules: pure functions from facts to findings, one a file, found by their place in the tree."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

# Facts are loaded with the rules, not by the first rule: code that takes modules out of ``sys.modules``
# again (pytest's own pytester does) would else leave rules that know no fact of later checks.
from pytest_lora import facts as facts
from pytest_lora.expect import Expect
from pytest_lora.findings import SEVERITIES, Finding, Severity

F = TypeVar("F")


class Violation(NamedTuple):
    """What a rule yields: a finding less what every finding of that rule shares.

    ``severity`` overrides the rule's own where the evidence is weaker or stronger than usual.
    """

    where: str
    observed: str
    expected: str
    fix: str
    severity: Severity | None = None


Judge = Callable[[F, Expect], Iterator[Violation]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of the catalogue: its code, its name (that of its file) and the facts it needs."""

    code: str
    name: str
    severity: Severity
    needs: type
    stage: str
    doc: str
    judge: Judge[Any]

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return self.doc.partition("\n")[0]

    def __call__(self, facts: object, expect: Expect) -> Iterator[Finding]:
        for violation in self.judge(facts, expect):
            where, observed, expected, fix, severity = violation
            yield Finding(self.code, self.name, severity or self.severity, where, observed, expected, fix)


_registered: dict[str, Rule] = {}


def rule(code: str, *, severity: Severity, needs: type[F]) -> Callable[[Judge[F]], Judge[F]]:
    """Register a function as the rule of its file.

    Raises:
        ValueError: The code is taken, the severity unknown, the documentation missing, or the function is
            not named like its file.
    """

    def register(judge: Judge[F]) -> Judge[F]:
        _, _, stage, file = judge.__module__.rsplit(".", 3)
        name = judge.__name__
        if name != file:
            raise ValueError(f"rule {name!r} must be in a file of its own name, not in {file!r}")
        if severity not in SEVERITIES:
            raise ValueError(f"rule {name!r}: severity must be one of {SEVERITIES}, not {severity!r}")
        if (known := _registered.get(code)) and known.name != name:
            raise ValueError(f"rule {name!r}: code {code} is already that of {known.name!r}")
        if not judge.__doc__:
            raise ValueError(f"rule {name!r} has no documentation")
        doc = inspect.cleandoc(judge.__doc__)
        _registered[code] = Rule(code, name, severity, needs, stage, doc, judge)
        return judge

    return register


@cache
def catalogue() -> tuple[Rule, ...]:
    """Every rule, ordered by code."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return tuple(_registered[code] for code in sorted(_registered))


def judge(
    facts: Iterable[object], expect: Expect, *, only: frozenset[str] | None = None
) -> Iterator[Finding]:
    """Yield what every rule that needs one of these facts (of these codes, if given) has to say about them.

    Raises:
        LookupError: No rule needs one of the facts, so that nothing would have been judged.
    """
    for fact in facts:
        fitting = [known for known in catalogue() if isinstance(fact, known.needs)]
        if not fitting:
            raise LookupError(f"no rule judges {type(fact).__name__}; its module was imported twice")
        for known in fitting:
            if only is None or known.code in only:
                yield from known(fact, expect)


def selected(findings: Iterable[Finding], select: Iterable[str], ignore: Iterable[str]) -> Iterator[Finding]:
    """Keep the findings whose code starts with one of ``select`` (all, if empty) and with none of ``ignore``.

    Raises:
        ValueError: A prefix fits no code of the catalogue, so that it would silently do nothing.
    """
    keep, drop = _prefixes("select", select), _prefixes("ignore", ignore)
    for finding in findings:
        if (not keep or finding.code.startswith(keep)) and not (drop and finding.code.startswith(drop)):
            yield finding


def _prefixes(argument: str, prefixes: Iterable[str]) -> tuple[str, ...]:
    if isinstance(prefixes, str):
        raise TypeError(f"{argument} must be a list of codes such as ['LORA1'], not the string {prefixes!r}")
    found = tuple(prefixes)
    for prefix in found:
        if not any(r.code.startswith(prefix) for r in catalogue()):
            raise ValueError(f"{argument}: {prefix!r} is no code or start of a code; --lora-rules lists them")
    return found
