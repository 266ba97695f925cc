"""From assertions to terminal and pytest-html: reports travel as JSON in ``user_properties``, under xdist as well."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING, Any

from pytest_lora.assertions import LoraHealthError, delivered
from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.findings import SEVERITIES, Finding, Report, Severity, counted
from pytest_lora.plugin.options import is_recorded, recorded
from pytest_lora.plugin.printed_pages import setting_lines
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

MOST_NUMBERS = 12
"""Numbers that are listed of a subject."""


def start(item: pytest.Item) -> None:
    """Forget what was delivered before this try of the test."""
    delivered.clear()
    item.user_properties[:] = [entry for entry in item.user_properties if not is_recorded(entry, PROPERTY)]


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
        text = report.to_json()
        if text not in recorded(item, PROPERTY):
            item.user_properties.append((PROPERTY, text))
            new.append(report)
    return new


def add_section(report: pytest.TestReport, call: pytest.CallInfo[None], config: pytest.Config) -> None:
    """Let pytest's short summary begin with the codes; with -v, show the whole report, not ten findings only."""
    error = call.excinfo.value if call.excinfo else None
    # An error is asked for nothing here, as what a class of its own raises then would end the session.
    if not issubclass(type(error), LoraHealthError):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = crash.message.removeprefix("pytest_lora.LoraHealthError: ")
    whole = vars(error).get("report")
    if report.failed and type(whole) is Report and config.get_verbosity() > 0:
        report.sections.append(("LoRA report", str(whole)))


def write(terminal: pytest.TerminalReporter, reports: Sequence[pytest.TestReport]) -> None:
    """Write the section "LoRA health": what was checked and what could not be, then one line a rule, worst first.

    With ``-q`` the rules alone, with ``-qq`` nothing, with ``-v`` infos too, with ``-vv`` what is in
    ``detail_lines``.
    """
    verbosity = terminal.config.get_verbosity()
    if verbosity < -1:
        return
    judged = {nodeid: own for nodeid, own in reports_by_test(reports).items() if own}
    if not judged:
        return
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
        for line in detail_lines(judged, reports, width):
            terminal.write_line(line)


def reports_by_test(reports: Iterable[pytest.TestReport]) -> dict[str, list[Report]]:
    """What the assertions judged, by the node id of the test.

    A test has a report for each phase and each try. Properties pile up over the phases and start anew with a
    try, so the last report of a test has them all.
    """
    last: dict[str, pytest.TestReport] = {}
    for report in sorted(reports, key=lambda report: report.start):
        last[report.nodeid] = report
    return {nodeid: list(_read(report)) for nodeid, report in last.items()}


def _read(report: pytest.TestReport) -> Iterator[Report]:
    for text in recorded(report, PROPERTY):
        with suppress(ValueError):  # a test may record what it likes under this name
            yield Report.from_json(text)


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


def cut(text: str, width: int) -> str:
    """A text in at most so many characters, without its middle where it is longer."""
    if len(text) <= width:
        return text
    head = max(width - 3, 2) * 2 // 3
    return f"{text[:head]}...{text[len(text) - max(width - 3 - head, 1) :]}"


def detail_lines(
    judged: dict[str, list[Report]], tests: Iterable[pytest.TestReport], width: int
) -> Iterator[str]:
    """The lines of every subject, the slowest first; what is too long for the terminal goes on in the next line.

    Args:
        judged: What was judged, by node id.
        tests: The reports of pytest, which know how long each phase took.
        width: Of the terminal.
    """
    for line in map(printable, _unbroken_lines(judged, tests, width)):
        margin = " " * (len(line) - len(line.lstrip()))
        # A broken word could begin a line with what a CI service takes for a command.
        whole = textwrap.TextWrapper(
            width, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
        )
        yield from whole.wrap(line) if len(line) > width else [line]


def _unbroken_lines(
    judged: dict[str, list[Report]], tests: Iterable[pytest.TestReport], width: int
) -> Iterator[str]:
    took: defaultdict[str, float] = defaultdict(float)
    for test in tests:
        took[test.nodeid] += test.duration
    subjects: defaultdict[str, dict[str, list[Report]]] = defaultdict(dict)
    for nodeid, reports in judged.items():
        for report in reports:
            subjects[report.subject].setdefault(nodeid, []).append(report)

    def seconds(subject: str) -> float:
        return sum(took[nodeid] for nodeid in subjects[subject])

    for subject in sorted(subjects, key=seconds, reverse=True):
        own = subjects[subject]
        several = f"{len(own)} test{'' if len(own) == 1 else 's'}"
        told = f": {seconds(subject):.2f} s in {several}"
        yield ""
        yield cut(subject, width - len(told)) + told
        reports = [report for of_test in own.values() for report in of_test]
        for nodeid in own if len(own) > 1 else ():
            yield f"  {took[nodeid]:6.2f} s  {cut(nodeid, width - 12)}"
        yield from _measured_lines(reports)
        cards = dict.fromkeys(one for r in reports for one in r.figures if isinstance(one, RecipeCard))
        for card in cards:
            yield from setting_lines(card)
            yield from (f"  {name}: {value}" for name, value in card.steps)


def _measured_lines(reports: Iterable[Report]) -> Iterator[str]:
    """What was measured, each number once."""
    known = dict.fromkeys(pair for report in reports for pair in report.measured)
    for name, value in list(known)[:MOST_NUMBERS]:
        yield f"  {name}: {value:,}" if isinstance(value, int) else f"  {name}: {value:g}"
    if len(known) > MOST_NUMBERS:
        yield f"  ... and {len(known) - MOST_NUMBERS} more numbers"


def add_to_page(report: pytest.TestReport, judged: Sequence[Report], config: pytest.Config) -> None:
    """Put what was judged in a phase under its test in the page of pytest-html; healthy reports are one line."""
    plugin: Any = config.pluginmanager.get_plugin("html")
    if plugin is not None and hasattr(plugin, "extras"):
        extended: Any = report
        extended.extras = [
            *getattr(report, "extras", ()),
            *(plugin.extras.html(_element(one)) for one in judged),
        ]


def _element(report: Report) -> str:
    return f'<pre class="lora-report">{escape(printable(str(report)))}</pre>'
