"""What a rule is, and how a function becomes one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pytest_lora.changes import Advice, Change, advise
from pytest_lora.expect import Expect
from pytest_lora.findings import SEVERITIES, Finding, Severity
from pytest_lora.values import (
    in_short,
    require_flag,
    require_items,
    require_one_of,
    require_text,
    require_whole,
    shown,
)

F = TypeVar("F")

MOST = 50
"""Findings of one rule on one set of facts: a configuration can have a thousand keys with one fault each, and every
fix spells out all of them."""

OnSaved = Literal["alone", "with_base", "refused", "merged"]
"""Where a rule on configurations also judges that of a saved adapter: from its folder alone and on a base; on a base
only; on a base on which PEFT refuses the configuration, so that no keys were compared; on a base before a merge."""


class RuleError(RuntimeError):
    """A rule of another package, or the package, is broken; the message names it."""


class Violation(NamedTuple):
    """What a rule yields: a finding less what every finding of that rule shares.

    ``fix`` is a sentence; where it asks for changes of settings, it is made of them (``advise``, ``change``).
    ``severity`` overrides the rule's own where the evidence is weaker or stronger than usual; ``line`` is that of the
    file that the facts are about; ``by_itself`` says that none of the rule's causes (``because_of``) explains it.
    """

    where: str
    observed: str
    expected: str
    fix: str | Change | Advice
    severity: Severity | None = None
    line: int | None = None
    by_itself: bool = False


Judge = Callable[[F, Expect], Iterator[Violation]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of the catalogue.

    Attributes:
        code: Its code, ``"LORA203"``.
        name: Its name, which is that of its function.
        severity: Severity of its findings, unless the evidence is weaker or stronger than usual.
        needs: Class of the facts that it judges.
        stage: The stage that it belongs to: the folder of its file, or the module of its facts.
        doc: Its documentation.
        judge: The function.
        aliases: Codes that it had before; they still select and ignore it.
        on_saved: Where it also judges the configuration of a saved adapter; None for nowhere.
        passing: Whether what it finds is a state that PEFT's own operations pass through.
        because_of: Names of the rules whose findings explain its own, which are then left out of a report.
    """

    code: str
    name: str
    severity: Severity
    needs: type
    stage: str
    doc: str
    judge: Judge[Any]
    aliases: tuple[str, ...] = ()
    on_saved: OnSaved | None = None
    passing: bool = False
    because_of: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return self.doc.partition("\n")[0]

    @property
    def codes(self) -> tuple[str, ...]:
        """The code and those that it had before."""
        return (self.code, *self.aliases)

    def __call__(self, facts: object, expect: Expect) -> Iterator[Finding]:
        try:
            yield from self._found(facts, expect)
        except GeneratorExit:
            raise
        except Exception as error:
            if is_own(self.judge):
                raise
            raise RuleError(
                f"rule {self.code} ({self.name} in {self.judge.__module__}) cannot be used: "
                f"{type(error).__name__}: {in_short(error)}; "
                "mend it, or uninstall the package that it comes from"
            ) from error

    def _found(self, facts: object, expect: Expect) -> Iterator[Finding]:
        violations = iter(self.judge(facts, expect))
        for number, violation in enumerate(islice(violations, MOST), 1):
            where, observed, expected, told, severity, line, by_itself = violation
            fix, changes = _fix(told)
            said = severity or self.severity
            require_one_of("severity", said, SEVERITIES)
            for name, text in (
                ("where", where),
                ("observed", observed),
                ("expected", expected),
                ("fix", fix),
            ):
                require_text(name, text)
            if line is not None:
                require_whole("line", line, least=1)
            if number == MOST and next(violations, None) is not None:
                observed = f"{observed}; and there are more like this"
            yield Finding(
                self.code,
                self.name,
                said,
                where,
                observed,
                expected,
                fix,
                line=line,
                by_itself=by_itself,
                changes=changes,
            )


def _fix(told: Any) -> tuple[Any, tuple[Change, ...]]:
    """The sentence of a fix and its changes; what is no fix stays what it is, and is refused as one."""
    whole = advise(told) if isinstance(told, (Change, Advice)) else Advice(told)
    return whole.text, whole.changes


registered: dict[str, Rule] = {}
"""Every rule whose module was loaded, by its code."""


def rule(
    code: str,
    *,
    severity: Severity,
    needs: type[F],
    aliases: Iterable[str] = (),
    on_saved: OnSaved | None = None,
    passing: bool = False,
    because_of: Iterable[str] = (),
) -> Callable[[Judge[F]], Judge[F]]:
    """Register a function as a rule: it takes facts and an ``Expect``, and yields a ``Violation`` for each fault.

    Args:
        code: Its code, for ever: letters and digits. Those of this package begin with ``LORA``; a package of yours
            takes a prefix of its own (``ACME001``).
        severity: ``"error"``, ``"warning"`` or ``"info"``; see ``Finding``.
        needs: The class of facts that it judges, such as ``pytest_lora.facts.model.ModelFacts``.
        aliases: Codes that it had before; they go on to select and ignore it.
        on_saved: For rules on ``ConfigFacts``: where it also judges the configuration of a saved adapter.
        passing: Whether PEFT's own operations pass through what it finds (merging, disabling).
        because_of: Names of rules that tell the same mistake at its root: beside an error of one of them, what this
            one finds is left out.

    Raises:
        ValueError: The code or the name is taken, the severity unknown, or the documentation missing.
    """

    if not isinstance(code, str) or not re.fullmatch(r"[A-Za-z]+[0-9]+", code, re.ASCII):
        raise ValueError(f"code must be letters and digits such as 'ACME001', not {shown(code)}")
    require_one_of("severity", severity, SEVERITIES)
    if not isinstance(needs, type):
        raise TypeError(f"needs must be a class of facts, not {shown(needs)}")
    former = require_items("aliases", aliases, "a list of codes", require_text)
    causes = require_items("because_of", because_of, "a list of names of rules", require_text)
    require_flag("passing", passing)
    if on_saved is not None:
        require_one_of("on_saved", on_saved, get_args(OnSaved))

    def register(judge: Judge[F]) -> Judge[F]:
        name = judge.__name__
        if not judge.__doc__:
            raise ValueError(f"rule {name!r} has no documentation")
        for known in registered.values():
            same_place = known.judge.__module__ == judge.__module__ and known.name == name
            if not same_place and (known.name == name or {code, *former} & {*known.codes}):
                raise ValueError(
                    f"rule {name!r}: its name or its code {code} is already that of {known.name!r}"
                )
        doc = inspect.cleandoc(judge.__doc__)
        stage = _stage(judge, needs)
        registered[code] = Rule(
            code, name, severity, needs, stage, doc, judge, former, on_saved, passing, causes
        )
        return judge

    return register


def _stage(judge: Judge[Any], needs: type) -> str:
    """The folder of a rule of this package; elsewhere the module of its facts, as in ``pytest_lora.facts.model``."""
    home = judge.__module__ if is_own(judge) else f"{needs.__module__}."
    return home.rsplit(".", 2)[1]


def is_own(judge: Judge[Any]) -> bool:
    """Whether a rule is one of this package."""
    return judge.__module__.startswith(f"{__package__}.")
