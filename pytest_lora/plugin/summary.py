"""From assertions to the terminal: reports travel as JSON in ``user_properties``, under xdist as well."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from pytest_lora.assertions import delivered
from pytest_lora.findings import SEVERITIES, Finding, Report, Severity, counted
from pytest_lora.plugin import details
from pytest_lora.plugin.details import cut
from pytest_lora.plugin.session_options import options_of
from pytest_lora.values import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    import pytest

PROPERTY = "lora_report"
_TEST = "test"
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
    verbose = item.config.get_verbosity() > 1
    kept = SHOWN_FIGURES if verbose or options_of(item.config).figures else 0
    while delivered:
        report = delivered.popleft()
        if len(delivered) >= kept:
            report = report.without_figures()
        if not verbose and not options_of(item.config).baseline:
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


def write(terminal: pytest.TerminalReporter, reports: Sequence[pytest.TestReport]) -> None:
    """Write the section "LoRA health": what was checked and what could not be, then one line a rule, worst first.

    With ``-q`` the rules alone, with ``-qq`` nothing, with ``-v`` infos too, with ``-vv`` what is in
    ``pytest_lora.plugin.details``.
    """
    verbosity = terminal.config.get_verbosity()
    if verbosity < -1:
        return
    judged = reports_by_test(reports)
    lowest = SEVERITIES if verbosity > 0 else SEVERITIES[:2]
    found = {nodeid: [f for report in own for f in report.findings] for nodeid, own in judged.items()}
    width = terminal._tw.fullwidth
    rules = list(rule_lines(found, lowest, width))
    if verbosity < 0 and not rules:
        return
    terminal.section("LoRA health")
    for line in () if verbosity < 0 else (*subject_lines(judged.values(), width), *left_lines(judged, width)):
        terminal.write_line(line)
    for severity, line in rules:
        terminal.write_line(line, **_COLOURS[severity])
    if verbosity > 1:
        for line in details.lines(judged, reports, width):
            terminal.write_line(line)


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


def subject_lines(judged: Collection[list[Report]], width: int = 80, shown: int = 5) -> Iterator[str]:
    """Yield in how many tests each subject was checked and healthy, the most checked subject first.

    Of more subjects than are shown there is a total, and those that are not healthy come first.
    """
    tests: Counter[str] = Counter()
    healthy: Counter[str] = Counter()
    worst: dict[str, Severity] = {}
    for reports in judged:
        for subject in {report.subject for report in reports}:
            grave = [f.severity for r in reports if r.subject == subject for f in (*r.errors, *r.warnings)]
            tests[subject] += 1
            healthy[subject] += not grave
            if grave:
                worst[subject] = min((*grave, worst.get(subject, "warning")), key=SEVERITIES.index)
    by_number = sorted(tests, key=lambda subject: (-tests[subject], subject))
    several = len(tests) > shown
    if several:
        counts = Counter(worst.values())
        parts = [f"{len(tests) - len(worst)} healthy"]
        parts += [f"{counts[s]} with {s}s" for s in SEVERITIES[:2] if counts[s]]
        yield f"{len(tests)} subjects in {_plural(len(judged), 'test')}: {', '.join(parts)}"
        by_number.sort(key=lambda subject: subject not in worst)
    listed = [subject for subject in by_number if subject in worst][: 4 * shown] if several else by_number
    for subject in listed:
        told = f": healthy in {healthy[subject]} of {_plural(tests[subject], 'test')}"
        yield printable(cut(subject, width - len(told)) + told)
    if several and len(worst) > len(listed):
        yield f"... and {_plural(len(worst) - len(listed), 'more subject')} with findings"


def left_lines(judged: dict[str, list[Report]], width: int = 80) -> Iterator[str]:
    """Yield what could not be judged, and why, as one line; where it is too long for the terminal it goes on."""
    tests: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for nodeid, reports in judged.items():
        for left in (one for report in reports for one in report.not_judged):
            tests[left].add(nodeid)
    parts = [
        f"{what} ({why}{'' if len(of) == len(judged) else f', in {_plural(len(of), _TEST)}'})"
        for (why, what), of in sorted(tests.items(), key=lambda pair: -len(pair[1]))
    ]
    if parts:
        yield from textwrap.wrap(
            f"not judged: {'; '.join(parts)}",
            width,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def rule_lines(
    found: dict[str, list[Finding]], shown: tuple[Severity, ...] = SEVERITIES, width: int = 80
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
    numbers = {rule: _how_many(counts[rule], len(tests[rule])) for rule in counts}
    most = width - max((len(f"{code} warning   {numbers[code, title]}") for code, title in counts), default=0)
    titles = min(max((len(title) for _, title in counts), default=0), max(most, 20))
    for rule in sorted(counts, key=lambda rule: (SEVERITIES.index(worst[rule]), rule)):
        code, title = rule
        yield worst[rule], f"{code} {worst[rule]:<7} {cut(title, titles):<{titles}}  {numbers[rule]}"


def _how_many(count: Counter[Severity], tests: int) -> str:
    several = _plural(count.total(), "finding") if len(count) == 1 else counted(count.elements())
    return f"{several} in {_plural(tests, _TEST)}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
