"""A sweep as its readers see it: a table, for a terminal and in Markdown, and a picture of what rank buys and costs."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_lora.facts.numbers import format_bytes, markdown_lines, text_lines
from pytest_lora.facts.sweep import percent, rate_text
from pytest_lora.files import write_whole
from pytest_lora.sweep.choice import METRIC_SHARE, RankChoice, enough
from pytest_lora.sweep.plot_panels import (
    THEMES,
    Theme,
    by_price,
    by_rate,
    prepare_ranks,
    say_not_known,
    title,
)
from pytest_lora.sweep.rows import RankOutcome, TrialRow
from pytest_lora.values import shown

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pytest_lora.sweep.result import SweepResult

UNITS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))
"""Prefixes of operations."""

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


def draw(
    result: SweepResult,
    path: str | os.PathLike[str],
    theme: Literal["light", "dark"],
    choice: RankChoice,
) -> Path:
    """Draw and write; ``SweepResult.plot`` documents the arguments."""
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}, not {shown(theme)}")
    file = Path(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'pytest-lora[plot]'") from error
    figure = Figure(figsize=(10, 9.6), dpi=150, layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"path must end in one of .{', .'.join(sorted(known))}, not {file.name!r}")
    _compose(figure, result, choice, THEMES[theme])
    # Without a date, the same sweep gives the same file.
    metadata: dict[str, Any] = {"Date": None} if file.suffix.lower() == ".svg" else {}
    drawn = BytesIO()
    figure.savefig(drawn, format=file.suffix[1:].lower(), metadata=metadata)
    write_whole(file, drawn.getvalue())
    return file


def _compose(figure: Figure, result: SweepResult, choice: RankChoice, theme: Theme) -> None:
    rows = [row for row in result.rows if row.metric is not None]
    figure.set_facecolor(theme.background)
    share = dict(choice.shares).get(choice.rank)
    of_best = "" if share is None else f": it reaches {percent(share)} of the best"
    rate = "" if choice.learning_rate is None else f" at {rate_text(choice.learning_rate)}"
    doubt = f"\n({'; '.join(choice.caveats)})" if choice.caveats else ""
    figure.suptitle(
        f"Rank {choice.rank}{rate}{of_best}{doubt}",
        x=0.012,
        ha="left",
        color=theme.ink,
        fontsize=14,
        fontweight="bold",
    )
    figure.set_layout_engine("constrained", hspace=0.08, wspace=0.05, w_pad=0.1, h_pad=0.08)
    grid = figure.add_gridspec(6, 2, width_ratios=(1.9, 1))
    _metric(figure.add_subplot(grid[:3, 0]), result, rows, choice, theme)
    below = grid[3:, :].subgridspec(1, 2)
    if any(row.rates for row in rows):
        by_rate(figure.add_subplot(below[0, 0]), result, rows, choice, theme)
        rest = below[0, 1]
    else:
        rest = below[0, :]
    time: tuple[str, list[float | None]] = ("training time, s", [row.seconds for row in rows])
    operations = _operations(rows)
    priced = time if None in operations[1] else operations
    by_price(figure.add_subplot(rest), result, rows, choice.rank, priced, theme)
    panels = (time, operations, _memory(rows))
    for position, (what, values) in enumerate(panels):
        axes = figure.add_subplot(grid[position, 1])
        _cost(axes, rows, what, values, choice.rank, theme)
        axes.tick_params(labelbottom=position == 2)
        if position == 2:
            axes.set_xlabel("rank", color=theme.ink)


def _operations(rows: list[RankOutcome]) -> tuple[str, list[float | None]]:
    most = max((row.flops for row in rows if row.flops is not None), default=None)
    if most is None:
        return "operations", [None for _ in rows]
    unit, size = next((one for one in UNITS if most >= one[1]), UNITS[-1])
    return f"operations, {unit}FLOP", [None if row.flops is None else row.flops / size for row in rows]


def _memory(rows: list[RankOutcome]) -> tuple[str, list[float | None]]:
    sources = sorted({row.memory for row in rows if row.peak_bytes is not None})
    title = f"peak memory, GiB ({' and '.join(sources)})" if sources else "peak memory, GiB"
    return title, [None if row.peak_bytes is None else row.peak_bytes / 2**30 for row in rows]


def _metric(
    axes: Axes, result: SweepResult, rows: list[RankOutcome], choice: RankChoice, theme: Theme
) -> None:
    ranks = [row.rank for row in rows]
    means = [row.metric or 0.0 for row in rows]
    prepare_ranks(axes, ranks, choice.rank, theme)
    goal = "more is better" if result.maximise else "less is better"
    at = ", each rank at its best rate" if any(row.rates for row in rows) else ""
    title(axes, f"{result.metric} ({goal}){at}", "rank", theme)
    for row in rows:
        values = [value for _, value in row.metrics]
        if len(values) > 1:
            axes.plot([row.rank] * len(values), values, "o", color=theme.line, alpha=0.35, ms=4, mew=0)
    axes.plot(ranks, means, color=theme.line, lw=2, marker="o", ms=6, zorder=3)
    spread = [(row.rank, row.metric or 0.0, row.spread) for row in rows if row.spread is not None]
    for rank, middle, deviation in spread:
        axes.errorbar(rank, middle, deviation, color=theme.line, lw=1.5, capsize=5, zorder=3)
    _draw_levels(axes, result, rows, choice, theme)
    _mark(axes, rows[ranks.index(choice.rank)], maximise=result.maximise, theme=theme)
    axes.margins(y=0.16)


def _draw_levels(
    axes: Axes, result: SweepResult, rows: list[RankOutcome], choice: RankChoice, theme: Theme
) -> None:
    """Lines at the metric that is enough and at that before training."""
    level_of_enough = enough(rows, choice, before=result.before, maximise=result.maximise)
    # At the right, the room between the two lines is free, whether the curve has risen or fallen.
    inwards = -1 if result.maximise else 1
    for level, text, side in (
        (level_of_enough, f"{percent(choice.metric_share)} of the best", inwards),
        (result.before, "before training", -inwards),
    ):
        if level is not None:
            axes.axhline(level, color=theme.faint, lw=1, ls=(0, (5, 4)), zorder=1)
            axes.annotate(
                text,
                (0.99, level),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4 * side),
                textcoords="offset points",
                ha="right",
                va="bottom" if side > 0 else "top",
                color=theme.faint,
                fontsize=9,
            )


def _mark(axes: Axes, chosen: RankOutcome, *, maximise: bool, theme: Theme) -> None:
    """A ring around the rank that is chosen, and its metric."""
    mean, beyond = chosen.metric or 0.0, (chosen.spread or 0.0) * (1 if maximise else -1)
    axes.plot([chosen.rank], [mean], "o", ms=13, mfc="none", mec=theme.chosen, mew=2.5, zorder=4)
    axes.annotate(
        f"r={chosen.rank}: {number(mean)}",
        (chosen.rank, mean + beyond),  # not on the bar of the spread
        xytext=(0, 13 if maximise else -13),
        textcoords="offset points",
        ha="center",
        va="bottom" if maximise else "top",
        color=theme.chosen,
        fontweight="bold",
    )


def _cost(
    axes: Axes, rows: list[RankOutcome], what: str, values: list[float | None], chosen: int, theme: Theme
) -> None:
    ranks = [row.rank for row in rows]
    points = [(rank, value) for rank, value in zip(ranks, values, strict=True) if value is not None]
    prepare_ranks(axes, ranks, chosen if points else None, theme)
    axes.set_title(what, loc="left", color=theme.ink, fontsize=10)
    if not points:
        say_not_known(axes, theme)
        return
    axes.plot(*zip(*points, strict=True), color=theme.line, lw=2, marker="o", ms=5, zorder=3)
    marked = [point for point in points if point[0] == chosen]
    axes.plot(*zip(*marked, strict=True) if marked else ((), ()), "o", ms=5, color=theme.chosen, zorder=4)
    # Costs start at zero: a curve that looks steep would overstate what rank changes.
    axes.set_ylim(0, 1.25 * max(value for _, value in points))
