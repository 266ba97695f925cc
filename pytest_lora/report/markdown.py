"""The report as Markdown, for a file or for GitHub's job summary: what is worth reading without a browser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from pytest_lora.facts.figures import AdapterMap, LossCurve, MemoryBudget, RankSweep
from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.facts.sweep import rate_text
from pytest_lora.report.digest import FoundIn, Shown, figures, rule_groups
from pytest_lora.report.map_view import map_view, number
from pytest_lora.report.session import (
    GPU_COLUMNS,
    GPU_TEXT_COLUMNS,
    Session,
    counted_tests,
    gpu_cells,
    gpu_troubles,
    ran_on_gpu,
    skipped_on_gpu,
)
from pytest_lora.report.text import markdown, markdown_block, markdown_code
from pytest_lora.values import printable

MOST_CHARACTERS = 400_000
"""Characters of findings; GitHub takes 1 MiB for all summaries of a step."""

NAMED_TESTS = 5
SHOWN_FAILURES = 50

_MARKS = {"error": "❌", "warning": "⚠️", "healthy": "✅"}


def markdown_report(session: Session, *, gpu_open: bool = False) -> str:
    """Everything that can be said without pictures; ``gpu_open`` where GPU tests are not to be folded away."""
    shown = figures(session)
    parts = (
        _head(session),
        _rules(session),
        _failures(session),
        _section("Recipes", (line for one in shown.recipes.shown for line in _recipe(one.figure))),
        _section("Adapters", (line for one in shown.maps.shown for line in _map(one))),
        _section("Losses", _losses(shown.curves.shown)),
        _section("Memory", (line for one in shown.budgets.shown for line in _budget(one.figure))),
        _section("Ranks", (line for one in shown.sweeps.shown for line in _sweep(one.figure))),
        _section("GPU tests", _gpu(session), folded=not gpu_open),
        _section("Session", _session(session)),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def gpu_section(session: Session) -> str:
    """What was measured on GPUs, alone."""
    return "\n".join(_section("GPU tests", _gpu(session), folded=False)) + "\n"


def _section(title: str, lines: Iterable[str], *, folded: bool = True) -> Iterator[str]:
    """Lines under a title, which unfolds them where they are folded away; nothing where there are none."""
    inside = list(lines)
    if inside:
        yield f"<details><summary>{title}</summary>" if folded else f"### {title}"
        yield ""
        yield from inside
        if folded:
            yield "</details>"
            yield ""


def _table(columns: Sequence[str], numbers: int = 0) -> Iterator[str]:
    """The head of a table whose last columns are numbers."""
    yield f"| {' | '.join(columns)} |"
    yield "| " + " | ".join(["---"] * (len(columns) - numbers) + ["---:"] * numbers) + " |"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(session: Session) -> Iterator[str]:
    worst = (
        "error"
        if session.with_verdict("error")
        else "warning"
        if session.with_verdict("warning")
        else "healthy"
    )
    yield f"## LoRA report: {markdown(session.name)}"
    yield ""
    yield f"{_MARKS[worst]} **{session.verdict}**" if session.judged else session.verdict
    yield ""
    if session.state != "finished":
        how = {"running": "has not ended", "interrupted": "was interrupted", "crashed": "crashed"}[
            session.state
        ]
        why = f": {markdown(session.problem)}" if session.problem else ""
        yield f"**This session {how}** after {session.done} of {counted_tests(session.collected)}{why}"
        yield ""


def _rules(session: Session) -> Iterator[str]:
    groups = rule_groups(session)
    if not groups:
        return
    yield from _table(("severity", "rule", "what", "found"))
    for group in groups:
        yield _row(group.severity, markdown(group.code), markdown(group.title), group.count)
    yield ""
    left = MOST_CHARACTERS
    for group in groups:
        if group.severity == "info":
            continue
        yield "<details><summary>" + f"{_plain(group.code)} {_plain(group.title)}: {group.count}</summary>"
        yield ""
        for index, one in enumerate(group.found):
            lines = list(_finding(one))
            left -= sum(map(len, lines))
            if left < 0:
                yield f"- and {len(group.found) - index} more"
                break
            yield from lines
        yield ""
        yield "</details>"
        yield ""


def _finding(one: FoundIn) -> Iterator[str]:
    finding = one.finding
    yield f"- **{markdown(finding.where)}**"
    yield f"  - observed: {markdown(finding.observed)}"
    yield f"  - expected: {markdown(finding.expected)}"
    if "\n" in finding.fix:
        yield "  - fix:"
        yield ""
        yield markdown_block(finding.fix, "    ")
        yield ""
    else:
        yield f"  - fix: **{markdown(finding.fix)}**"
    named = ", ".join(markdown_code(test.nodeid) for test in one.tests[:NAMED_TESTS])
    more = f" and {counted_tests(len(one.tests) - NAMED_TESTS)} more" if len(one.tests) > NAMED_TESTS else ""
    yield f"  - in {named}{more}"


def _failures(session: Session) -> Iterator[str]:
    others = [test for test in session.tests if test.fails_otherwise]
    if not others:
        return
    yield "### Other failures"
    yield ""
    for test in others[:SHOWN_FAILURES]:
        yield f"- {markdown_code(test.nodeid)}" + (f": {markdown(test.message)}" if test.message else "")
    if len(others) > SHOWN_FAILURES:
        yield f"- and {len(others) - SHOWN_FAILURES} more"
    yield ""


def _recipe(card: RecipeCard) -> Iterator[str]:
    yield f"### {markdown(card.title)} for {markdown(card.tool)}"
    yield ""
    if card.peak is not None:
        verdict = {True: ": fits", False: ": does not fit", None: ""}[card.fits]
        of = "" if card.budget is None else f" of {format_bytes(card.budget)}"
        yield f"{format_bytes(card.peak)}{of}{verdict}{f' ({markdown(card.note)})' if card.note else ''}"
        yield ""
    yield from (f"- {markdown(name)}: {markdown(value)}" for name, value in card.steps)
    yield ""
    yield from _table(("setting", "the run has", "from"))
    for row in card.rows:
        asked = f"; asked for {row.asked}: {row.why}" if row.asked else ""
        yield _row(markdown_code(row.name, in_table=True), markdown(row.value), markdown(row.source + asked))
    yield ""


def _map(one: Shown[AdapterMap]) -> Iterator[str]:
    shown = one.figure
    yield f"### Adapter {markdown(shown.adapter)} on {markdown(shown.base)}"
    yield ""
    tests = ", ".join(markdown_code(test.nodeid) for test in one.tests[:3])
    yield f"in {tests}" + (f" and {len(one.tests) - 3} more" if len(one.tests) > 3 else "")
    yield ""
    share = f"{number(shown.percent, 3)} %"
    if shown.saved:
        of_all = f": {share} of the model" if shown.total_parameters else ""
        yield f"saved, {shown.trainable_parameters:,} numbers in LoRA factors{of_all}"
    else:
        yield f"{shown.trainable_parameters:,} of {shown.total_parameters:,} parameters train: {share}"
    yield ""
    measured = [n for n, values in (("gradient", shown.gradients), ("update", shown.updates)) if values]
    yield from _table(("module", "layers", "state", "rank", "scaling", *measured), 2 + len(measured))
    for run in map_view(shown).runs[:100]:
        yield _row(
            markdown_code(run.module, in_table=True),
            markdown(run.layers),
            run.state,
            run.rank,
            run.scaling,
            *(getattr(run, name) for name in measured),
        )
    yield ""


def _losses(curves: Sequence[Shown[LossCurve]]) -> Iterator[str]:
    if not curves:
        return
    yield from _table(("run", "before", "after", "drop", "asked for"), 4)
    for one in curves:
        curve = one.figure
        drop = "" if curve.drop is None else f"{number(100 * curve.drop, 3)} %"
        wanted = "" if curve.wanted is None else f"{number(100 * curve.wanted, 3)} %"
        yield _row(markdown(curve.title), number(curve.before), number(curve.after), drop, wanted)
    yield ""


def _budget(budget: MemoryBudget) -> Iterator[str]:
    yield f"### Memory: {markdown(budget.title)}"
    yield ""
    verdict = "fits" if budget.fits else "does not fit"
    measured = "" if budget.measured is None else f"; measured {format_bytes(budget.measured)}"
    yield (
        f"{_MARKS['healthy' if budget.fits else 'error']} {format_bytes(budget.peak_allocated)} of "
        f"{format_bytes(budget.budget)}: {verdict}{measured}"
    )
    yield ""
    yield from _table(("what", "bytes"), 1)
    for name, size in sorted(budget.breakdown, key=lambda part: -part[1]):
        yield _row(markdown(name), format_bytes(size))
    yield ""
    if budget.what_if:
        yield from _table(("", "what if", "peak"), 1)
        for one in budget.what_if:
            mark = _MARKS["healthy" if one.fits else "error"]
            yield _row(mark, markdown_code(one.change, in_table=True), format_bytes(one.peak))
        yield ""


def _sweep(sweep: RankSweep) -> Iterator[str]:
    chosen = "no rank was chosen" if sweep.chosen is None else f"rank {sweep.chosen} is chosen"
    yield f"### Ranks: {markdown(sweep.title)}"
    yield ""
    yield f"**{chosen}** by {markdown(sweep.metric)}, of which {'more' if sweep.maximise else 'less'} is better"
    yield ""
    yield from (f"- {markdown(reason)}" for reason in sweep.reasons)
    yield ""
    columns = ("rank", "best rate", "metric", "spread", "seconds", "FLOPs", "peak", "trainable")
    yield from _table(("problem", *columns), len(columns))
    for trial in sweep.trials:
        numbers = (trial.metric, trial.spread, trial.seconds, trial.flops)
        peak = "" if trial.peak_bytes is None else format_bytes(trial.peak_bytes)
        rate = "" if trial.rate is None else rate_text(trial.rate)
        measured = (*map(number, numbers), peak, f"{trial.trainable_parameters:,}")
        yield _row(markdown(trial.problem), str(trial.rank), rate, *measured)
    yield ""


def _gpu(session: Session) -> Iterator[str]:
    uses = {test.nodeid: test.gpu for test in session.tests if test.gpu is not None}
    if not uses:
        return
    if ran := ran_on_gpu(uses):
        yield from _table(GPU_COLUMNS, len(GPU_COLUMNS) - GPU_TEXT_COLUMNS)
        for test, use in ran.items():
            _, *others = gpu_cells(test, use)
            yield _row(markdown_code(test, in_table=True), *map(markdown, others))
        yield ""
    for reason, tests in skipped_on_gpu(uses).items():
        yield f"- skipped: {markdown(reason)}"
        yield from (f"  - {markdown_code(test)}" for test in tests)
    yield from (f"- {markdown(trouble)}" for trouble in gpu_troubles(uses))
    yield ""


def _session(session: Session) -> Iterator[str]:
    yield f"- run again: {markdown_code(session.command)} in {markdown_code(session.folder)}"
    yield f"- started {markdown(session.started)}, took {number(session.seconds)} s"
    yield f"- tests: {', '.join(f'{count} {markdown(outcome)}' for outcome, count in session.counts) or 'none ended'}"
    yield f"- seeds: {', '.join(markdown(' '.join(pair)) for pair in session.seeds) or 'none set by pytest'}"
    yield f"- versions: {', '.join(markdown(' '.join(pair)) for pair in session.versions)}"
    yield ""


def _plain(text: str) -> str:
    """A text inside of an HTML element, in which Markdown is not looked at."""
    return escape(" ".join(printable(text).split()))
