"""What rules say: findings and the report that holds them. Strings and numbers only."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_lora.changes import Change
from pytest_lora.facts.figures import Figure, from_plain, to_plain
from pytest_lora.values import LONGEST_OF_A_FINDING, in_short, json_text, printable, shown

if TYPE_CHECKING:
    from pytest_lora.facts.measures import Measures

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

_INDEX = re.compile(r"\d(?<![^.]\d)\d*(?=\.|$)")
"""A part of digits alone; it begins with what it is looked for by, which takes a third of the time."""


class LoraHealthWarning(UserWarning):
    """A finding of severity "warning". ``-W error::pytest_lora.LoraHealthWarning`` is the strict mode."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a rule saw.

    Its texts may hold names that strangers chose: what would do anything to a terminal, a log or a page becomes an
    escape here, so that no rule needs to think of it.

    Attributes:
        code: Stable code of the rule, such as ``"LORA203"``.
        rule: Name of the rule, which says what is wrong, such as ``"adapter_left_merged"``.
        severity: ``"error"`` (training or loading is broken or does not do what was configured),
            ``"warning"`` (works, but almost surely not meant) or ``"info"`` (worth knowing).
        where: The modules or the argument that it is about, grouped.
        observed: What was seen.
        expected: What a healthy set-up has there.
        fix: The one change that mends it.
        file: Path of the file that it is about, where it is about a line of one; else empty.
        line: That line, from 1.
        by_itself: Whether it stands whatever else was found, although its rule names causes (``Rule.because_of``).
        changes: The changes of settings that ``fix`` says, in their order there; none where it asks for something else.
    """

    code: str
    rule: str
    severity: Severity
    where: str
    observed: str
    expected: str
    fix: str
    file: str = ""
    line: int | None = None
    by_itself: bool = field(default=False, repr=False)
    changes: tuple[Change, ...] = field(default=(), repr=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("code", "rule", "where", "observed", "expected", "fix", "file"):
            text = getattr(self, name)
            clean = printable(text, LONGEST_OF_A_FINDING)
            if clean is not text:
                object.__setattr__(self, name, clean)
        if self.changes != ():
            said = map(_said, self.changes)  # a fix that was too long says some of them no more
            object.__setattr__(self, "changes", tuple(one for one in said if one.said in self.fix))

    @property
    def title(self) -> str:
        """The rule's name as words."""
        return self.rule.replace("_", " ")

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.severity}[{self.code}]: {self.title}",
                f"  --> {self.where}",
                f"  observed: {self.observed}",
                f"  expected: {self.expected}",
                f"  fix:      {self.fix}",
            )
        )


@dataclass(frozen=True, slots=True)
class Report:
    """The findings of one check, the gravest first.

    ``ok`` is true when no finding is an error: warnings and infos never fail an assertion.

    Attributes:
        subject: What was judged.
        findings: What was found.
        figures: What was seen on the way and is worth a look: a map of the adapter, a loss curve, a memory budget.
        measured: Numbers that a baseline compares, by name: trainable parameters, scalings, a predicted peak (bytes),
            losses and their relative drop.
        not_judged: What could not be judged, as pairs: why (``"no batch given"``), and what (``"41 training rules"``).
    """

    subject: str
    findings: tuple[Finding, ...] = ()
    figures: tuple[Figure, ...] = field(default=(), repr=False)
    measured: Measures = field(default=(), repr=False)
    not_judged: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        ordered = sorted(self.findings, key=lambda f: (SEVERITIES.index(f.severity), f.code))
        object.__setattr__(self, "findings", tuple(ordered))
        object.__setattr__(self, "subject", printable(self.subject))
        object.__setattr__(self, "measured", tuple((printable(name), n) for name, n in self.measured))
        object.__setattr__(
            self, "not_judged", tuple((printable(why), printable(what)) for why, what in self.not_judged)
        )

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == severity)

    @property
    def errors(self) -> tuple[Finding, ...]:
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return self._of("warning")

    @property
    def infos(self) -> tuple[Finding, ...]:
        return self._of("info")

    @property
    def ok(self) -> bool:
        return not self.errors

    def lines(self, limit: int | None = None) -> Iterator[str]:
        """Yield the report line by line, at most ``limit`` findings of it."""
        if not self.findings:
            yield printable(f"{self.subject}: healthy")
            return
        yield printable(f"{self.subject}: {counted(f.severity for f in self.findings)}")
        shown = self.findings[:limit]
        for finding in shown:
            yield ""
            yield from str(finding).splitlines()
        if hidden := len(self.findings) - len(shown):
            yield ""
            yield f"... {hidden} more (-v shows all)"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def with_findings(self, findings: Iterable[Finding]) -> Report:
        """The same report with other findings."""
        return replace(self, findings=tuple(findings))

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the errors, each once; without errors those of the warnings."""
        return tuple(dict.fromkeys(f.code for f in self.errors or self.warnings))

    def measure(self, name: str) -> float:
        """One of the numbers that were measured.

        Raises:
            KeyError: There is none of this name; the message has those that there are.
        """
        known = dict(self.measured)
        if not isinstance(name, str) or name not in known:
            raise KeyError(
                f"name: nothing is measured under {shown(name)}; there are {', '.join(known) or 'no numbers'}"
            )
        return known[name]

    def without_figures(self) -> Report:
        """The report without pictures, which is what a test's log needs."""
        return replace(self, figures=())

    def without_numbers(self) -> Report:
        """The report without what a baseline compares."""
        return replace(self, measured=())

    def to_dataframe(self) -> Any:
        """The findings as a ``pandas.DataFrame``: a row each, with the fields of ``Finding`` and the ``subject``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas: Any = import_module("pandas")
        except ImportError as error:
            raise ImportError("Report.to_dataframe needs pandas: pip install pandas") from error
        columns = ["subject", *(one.name for one in fields(Finding))]
        return pandas.DataFrame(
            [{"subject": self.subject, **asdict(f)} for f in self.findings], columns=columns
        )

    def _repr_html_(self) -> str:
        """The report as a small card in a notebook; what is not an error is folded away."""
        counts = counted(f.severity for f in self.findings) or "healthy"
        colour = _CARD[min((SEVERITIES.index(f.severity) for f in self.findings), default=len(SEVERITIES))]
        cells = "".join(map(_card_of, self.findings))
        return (
            f'<div style="border-left:4px solid {colour};padding:.2em .8em;margin:.4em 0;max-width:60em">'
            f"<div><b>{escape(self.subject)}</b>: {counts}</div>{cells}</div>"
        )

    def to_json(self) -> str:
        """The report as one JSON object: ``subject``, ``ok``, ``findings``, and any ``measured``, ``figures`` and
        ``not_judged``."""
        data: dict[str, object] = {
            "subject": self.subject,
            "ok": self.ok,
            "findings": [asdict(f) for f in self.findings],
        }
        if self.measured:
            data["measured"] = dict(self.measured)
        if self.figures:
            data["figures"] = [to_plain(one) for one in self.figures]
        if self.not_judged:
            data["not_judged"] = [{"why": why, "what": what} for why, what in self.not_judged]
        return json_text(data)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that ``to_json`` wrote.

        Raises:
            ValueError: It is no report, or has a figure of a kind that this version does not know.
        """
        try:
            data = json.loads(text)
            return cls(
                data["subject"],
                tuple(Finding(**f) for f in data["findings"]),
                tuple(from_plain(one) for one in data.get("figures", ())),
                tuple(data.get("measured", {}).items()),
                tuple((one["why"], one["what"]) for one in data.get("not_judged", ())),
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"text is no report: {in_short(error)}") from error


def _said(one: Change | dict[str, Any]) -> Change:
    """A change, or what a report of JSON has of one, as the fix of a finding says it."""
    read = one if isinstance(one, Change) else Change(**one)
    return replace(read, said=printable(read.said, LONGEST_OF_A_FINDING))


_CARD = ("#c62828", "#b26a00", "#2f5f9a", "#2e7d4f")
"""Colours of a card by the gravest finding, the last without any; readable on white and on black."""


def _card_of(finding: Finding) -> str:
    """A finding as HTML, open where it is an error."""
    opened = " open" if finding.severity == "error" else ""
    words = (("seen", finding.observed), ("expected", finding.expected), ("fix", finding.fix))
    told = "".join(f"<div>{name}: {escape(text)}</div>" for name, text in words)
    return (
        f'<details{opened} style="margin:.3em 0"><summary>{escape(finding.severity)} {escape(finding.code)}: '
        f"{escape(finding.title)}</summary>"
        f'<div style="padding-left:1.2em;white-space:pre-wrap;overflow-wrap:anywhere">'
        f"<code>{escape(finding.where)}</code>{told}</div></details>"
    )


def counted(severities: Iterable[str]) -> str:
    """``["error", "error", "info"]`` as "2 errors, 1 info"."""
    counts = Counter(severities)
    return ", ".join(f"{n} {s}{'s' if n > 1 else ''}" for s in SEVERITIES if (n := counts[s]))


def starred(name: str) -> str:
    """A module name with its numbers as stars: ``"model.layers.*.self_attn.q_proj"``."""
    return _INDEX.sub("*", name) if "." in name else name


def grouped(names: Iterable[str], limit: int = 4) -> str:
    """Module names as a reader wants them: ``"28 modules: model.layers.*.self_attn.q_proj"``.

    Names that differ only in their numbers are one group; at most ``limit`` groups are spelled out.
    """
    groups: dict[str, list[str]] = {}
    total = 0
    for name in names:
        groups.setdefault(starred(name), []).append(name)
        total += 1
    if total == 1:
        return next(iter(groups.values()))[0]
    shown = [pattern if len(members) > 1 else members[0] for pattern, members in groups.items()]
    more = f", and {len(shown) - limit} more groups" if len(shown) > limit else ""
    return f"{total} modules: {', '.join(shown[:limit])}{more}"
