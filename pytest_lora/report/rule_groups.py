"""The findings of a session by rule, the gravest rule first; equal findings of several tests once."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytest_lora.findings import SEVERITIES, Finding, Severity, counted
from pytest_lora.report.session import RanTest, Session, counted_tests


@dataclass(slots=True)
class FoundIn:
    """A finding and the tests that have it."""

    finding: Finding
    tests: list[RanTest] = field(default_factory=list)


@dataclass(slots=True)
class RuleGroup:
    """What one rule found.

    Attributes:
        code: Its code.
        title: Its name as words.
        found: Each distinct finding, the gravest first.
    """

    code: str
    title: str
    found: list[FoundIn]

    @property
    def severity(self) -> Severity:
        """The gravest."""
        return min((one.finding.severity for one in self.found), key=SEVERITIES.index)

    @property
    def count(self) -> str:
        """How many findings in how many tests."""
        severities = [one.finding.severity for one in self.found for _ in one.tests]
        number = len(severities)
        several = f"{number} finding{'' if number == 1 else 's'}"
        findings = several if len(set(severities)) == 1 else counted(severities)
        return (
            f"{findings} in {counted_tests(len({test.nodeid for one in self.found for test in one.tests}))}"
        )


def rule_groups(session: Session) -> list[RuleGroup]:
    """The groups of a session, errors first, then by code."""
    groups: dict[str, dict[Finding, FoundIn]] = {}
    for test in session.tests:
        for finding in dict.fromkeys(test.findings):
            found = groups.setdefault(finding.code, {}).setdefault(finding, FoundIn(finding))
            found.tests.append(test)
    made = [
        RuleGroup(
            code,
            next(iter(found)).title,
            sorted(found.values(), key=lambda one: SEVERITIES.index(one.finding.severity)),
        )
        for code, found in groups.items()
    ]
    return sorted(made, key=lambda group: (SEVERITIES.index(group.severity), group.code))
