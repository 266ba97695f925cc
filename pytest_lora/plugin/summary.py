"""From assertions to the terminal: reports travel as JSON in ``user_properties``, under xdist as well."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from pytest_lora.assertions import delivered
from pytest_lora.findings import SEVERITIES, Finding, Report, Severity, counted
from pytest_lora.plugin.session_options import options_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pytest

PROPERTY = "lora_report"
SHOWN_FIGURES = 20
"""Reports of a phase that keep what they show beside findings: a property test makes hundreds, of which the last ones
are those of a failure."""
_COLOURS: dict[Severity, dict[str, bool]] = {
    "error": {"red": True},
    "warning": {"yellow": True},
    "info": {},
}


def start(item: pytest.Item) -> None:
    """Forget what was delivered before this try of the test."""
    delivered.clear()
    item.user_properties[:] = [(name, value) for name, value in item.user_properties if name != PROPERTY]


def collect(item: pytest.Item) -> list[Report]:
    """Move the delivered reports to the test's properties, each distinct one once.

    What they show beside findings goes along only where somebody is going to look at it.

    Returns:
        The reports that are new.
    """
    new: list[Report] = []
    kept = SHOWN_FIGURES if options_of(item.config).figures else 0
    while delivered:
        report = delivered.popleft()
        if len(delivered) >= kept:
            report = report.without_figures()
        if not options_of(item.config).baseline:
            report = report.without_numbers()
        entry = (PROPERTY, report.to_json())
        if entry not in item.user_properties:
            item.user_properties.append(entry)
            new.append(report)
    return new


def add_section(report: pytest.TestReport, call: pytest.CallInfo[None], config: pytest.Config) -> None:
    """Let pytest's short summary begin with the codes; with -v, show the whole report, not ten findings only."""
    whole = getattr(call.excinfo.value, "report", None) if call.excinfo else None
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and call.excinfo is not None and isinstance(whole, Report):
        crash.message = str(call.excinfo.value)
    if report.failed and isinstance(whole, Report) and config.get_verbosity() > 0:
        report.sections.append(("LoRA report", str(whole)))


def write(terminal: pytest.TerminalReporter, reports: Iterable[pytest.TestReport]) -> None:
    """Write the section "LoRA health": what was checked, then one line a rule, worst first; infos only with -v."""
    judged = reports_by_test(reports)
    lowest = SEVERITIES if terminal.config.get_verbosity() > 0 else SEVERITIES[:2]
    found = {nodeid: [f for report in own for f in report.findings] for nodeid, own in judged.items()}
    terminal.section("LoRA health")
    for line in subject_lines(judged.values()):
        terminal.write_line(line)
    for severity, line in rule_lines(found, lowest):
        terminal.write_line(line, **_COLOURS[severity])


def reports_by_test(reports: Iterable[pytest.TestReport]) -> dict[str, list[Report]]:
    """What the assertions judged, by the node id of the test.

    A test has a report for each phase and each try. Properties pile up over the phases and start anew with a
    try, so the last report of a test has them all.
    """
    last: dict[str, pytest.TestReport] = {}
    for report in sorted(reports, key=lambda report: report.start):
        last[report.nodeid] = report
    return {
        nodeid: [Report.from_json(str(v)) for name, v in report.user_properties if name == PROPERTY]
        for nodeid, report in last.items()
    }


def subject_lines(judged: Iterable[list[Report]], shown: int = 5) -> Iterator[str]:
    """Yield in how many tests each subject was checked and healthy, the most checked subject first."""
    tests: Counter[str] = Counter()
    healthy: Counter[str] = Counter()
    for reports in judged:
        for subject in {report.subject for report in reports}:
            own = [report for report in reports if report.subject == subject]
            tests[subject] += 1
            healthy[subject] += not any(report.errors or report.warnings for report in own)
    for subject, number in sorted(tests.items(), key=lambda pair: (-pair[1], pair[0]))[:shown]:
        yield f"{subject}: healthy in {healthy[subject]} of {_plural(number, 'test')}"
    if len(tests) > shown:
        yield f"... and {_plural(len(tests) - shown, 'more subject')}"


def rule_lines(
    found: dict[str, list[Finding]], shown: tuple[Severity, ...] = SEVERITIES
) -> Iterator[tuple[Severity, str]]:
    """Yield the worst severity of each rule and its line, the worst rule first."""
    counts: defaultdict[tuple[str, str], Counter[Severity]] = defaultdict(Counter)
    tests: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for nodeid, findings in found.items():
        for finding in findings:
            if finding.severity in shown:
                counts[finding.code, finding.title][finding.severity] += 1
                tests[finding.code, finding.title].add(nodeid)
    worst = {rule: min(count, key=SEVERITIES.index) for rule, count in counts.items()}
    width = max((len(title) for _, title in counts), default=0)
    for rule in sorted(counts, key=lambda rule: (SEVERITIES.index(worst[rule]), rule)):
        code, title = rule
        in_tests = _plural(len(tests[rule]), "test")
        how_many = (
            _plural(counts[rule].total(), "finding")
            if len(counts[rule]) == 1
            else counted(counts[rule].elements())
        )
        yield worst[rule], f"{code} {worst[rule]:<7} {title:<{width}}  {how_many} in {in_tests}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
