"""A sweep as a table, for a terminal and in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora.facts.numbers import format_bytes, markdown_lines, text_lines
from pytest_lora.facts.sweep import percent, rate_text
from pytest_lora.sweep.choice import METRIC_SHARE
from pytest_lora.sweep.rows import RankOutcome, TrialRow

if TYPE_CHECKING:
    from pytest_lora.sweep.result import SweepResult

MISSING = "-"


def text_table(result: SweepResult) -> str:
    """The table with aligned columns, its title above and failures below."""
    return "\n".join((_title(result), *text_lines(_cells(result)), *_notes(result)))


def markdown_table(result: SweepResult) -> str:
    """The same in Markdown."""
    notes = [f"- {note}" for note in _notes(result)]
    return "\n".join(
        (f"{_title(result)}:", "", *markdown_lines(_cells(result)), *([""] if notes else []), *notes)
    )


def _title(result: SweepResult) -> str:
    seeds = len({row.seed for row in result.trials})
    goal = "more is better" if result.maximise else "less is better"
    before = "" if result.before is None else f", {number(result.before)} before training"
    alpha = f"; alpha {result.settings['alpha']}" if "alpha" in result.settings else ""
    rates = ", each at its best rate" if any(row.rates for row in result.rows) else ""
    return f"{result.metric} by rank{rates} ({goal}{before}; {seeds} seed{'s' if seeds > 1 else ''}{alpha})"


def _cells(result: SweepResult) -> list[tuple[str, ...]]:
    shares = result.shares()
    memory = {row.memory for row in result.rows if row.peak_bytes is not None}
    peak = "peak memory" + (f" ({memory.pop()})" if len(memory) == 1 else "")
    head: tuple[str, ...] = (
        "rank",
        result.metric,
        "+-",
        "of the best",
        "seconds",
        "GFLOP",
        peak,
        "trainable",
    )
    rows = [_row(row, shares.get(row.rank)) for row in result.rows]
    if any(row.rates for row in result.rows):
        head = ("rank", "rate", "rate x scaling", *head[1:])
        rows = [(line[0], *_rate(row), *line[1:]) for row, line in zip(result.rows, rows, strict=True)]
    return [head, *rows]


def _rate(row: RankOutcome) -> tuple[str, str]:
    """The best rate and the effective step."""
    return (
        MISSING if row.learning_rate is None else rate_text(row.learning_rate),
        MISSING if row.step is None else rate_text(row.step),
    )


def _row(row: RankOutcome, share: float | None) -> tuple[str, ...]:
    return (
        str(row.rank),
        MISSING if row.metric is None else number(row.metric),
        MISSING if row.spread is None else f"{row.spread:.2g}",
        MISSING if share is None else percent(share, METRIC_SHARE),
        MISSING if row.seconds is None else f"{row.seconds:.3g}",
        MISSING if row.flops is None else f"{row.flops / 1e9:,.4g}",
        MISSING if row.peak_bytes is None else format_bytes(row.peak_bytes),
        MISSING if row.trainable is None else f"{row.trainable:,}",
    )


def _notes(result: SweepResult) -> list[str]:
    notes = [f"r={row.rank}{_at(row)}, seed {row.seed}: {row.failure}" for row in result.failed]
    unknown = {row.memory for row in result.rows if row.peak_bytes is None and row.memory}
    notes += [f"peak memory {why}" for why in sorted(unknown)]
    errors: dict[str, set[int]] = {}
    for row in result.trials:
        for finding in row.findings:
            if finding.severity == "error":
                errors.setdefault(f"{finding.code} {finding.title}", set()).add(row.rank)
    notes += [f"{said} at r={', '.join(map(str, sorted(ranks)))}" for said, ranks in sorted(errors.items())]
    return notes


def _at(row: TrialRow) -> str:
    return "" if row.learning_rate is None else f" at {rate_text(row.learning_rate)}"


def number(value: float) -> str:
    """A metric with four digits."""
    return f"{value:.4g}"
