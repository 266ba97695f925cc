"""Panels of the picture of a sweep: colours and axes, the metric by learning rate, the metric against its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_lora.facts.sweep import frontier, percent, rate_text, spread_out
from pytest_lora.sweep.choice import RankChoice
from pytest_lora.sweep.rows import RankOutcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pytest_lora.sweep.result import SweepResult


DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (10, 3)), (0, (1, 2.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
"""A line of each rank differs in both, so that it can be told without colour."""


class Theme(NamedTuple):
    """Colours, which also differ in lightness, so that they survive print and colour blindness."""

    background: str
    ink: str
    faint: str
    grid: str
    line: str
    chosen: str
    lines: tuple[str, ...]


_DARK = ("#0b3c6f", "#2f6fb3", "#1d7a6c", "#7a4fa3", "#9a6400", "#5c6670")
_LIGHT = ("#cfe4fa", "#7db4ee", "#7fd1bf", "#cfa8ee", "#e6c06a", "#a9b3bd")
"""Lines of ranks: dark ones on a light ground, light ones on a dark one."""

THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#6a737d", "#e3e6ea", "#2f6fb3", "#c2410c", _DARK),
    "dark": Theme("#14171c", "#e6e8eb", "#98a1ab", "#2b3038", "#7db4ee", "#ff9d5c", _LIGHT),
}


def prepare_ranks(axes: Axes, ranks: list[int], chosen: int | None, theme: Theme) -> None:
    """A logarithmic axis with the ranks themselves on it, a grid, and a band at the rank that is chosen, if one is."""
    from matplotlib.ticker import NullLocator

    prepare(axes, theme)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(ranks) / 1.35, max(ranks) * 1.35)
    if chosen is not None:
        half = (1.35**2 * max(ranks) / min(ranks)) ** 0.025
        axes.axvspan(chosen / half, chosen * half, color=theme.chosen, alpha=0.14, lw=0, zorder=0)


def prepare(axes: Axes, theme: Theme) -> None:
    """Colours, a grid of horizontal lines, and two sides of the frame."""
    axes.set_facecolor(theme.background)
    axes.grid(True, axis="y", color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.faint, labelcolor=theme.ink, length=3, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def title(axes: Axes, text: str, below: str, theme: Theme) -> None:
    """What a panel shows, and what its horizontal axis is."""
    axes.set_title(text, loc="left", color=theme.ink, fontsize=11)
    axes.set_xlabel(below, color=theme.ink)


LABEL = 0.062
"""Height of a label beside a line, as a share of a panel."""


def by_rate(
    axes: Axes, result: SweepResult, rows: Sequence[RankOutcome], choice: RankChoice, theme: Theme
) -> None:
    """A line a rank, with the band of its seeds and its name at the end; open marks are rates that halving dropped."""
    from matplotlib.ticker import NullLocator

    prepare(axes, theme)
    axes.set_xscale("log")
    rates = sorted({rate.learning_rate for row in rows for rate in row.rates})
    axes.set_xticks(rates, [rate_text(rate) for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    step = (rates[-1] / rates[0]) ** 0.06 if len(rates) > 1 else 1.5
    axes.set_xlim(rates[0] / step, rates[-1] * step**3.2)
    ends: list[tuple[float, float]] = []
    for index, row in enumerate(rows):
        ends.append(_line(axes, row, index, row.rank == choice.rank, theme))
    title(axes, f"{result.metric} by learning rate", "learning rate", theme)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    places = spread_out([(y - low) / (high - low) for _, y in ends], LABEL)
    for index, (row, end, place) in enumerate(zip(rows, ends, places, strict=True)):
        is_chosen = row.rank == choice.rank
        axes.annotate(
            f"r={row.rank}",
            end,
            xytext=(0.95, place),
            textcoords="axes fraction",
            ha="left",
            va="center",
            color=theme.chosen if is_chosen else _colour(index, theme),
            fontsize=9,
            fontweight="bold" if is_chosen else "normal",
            arrowprops={"arrowstyle": "-", "color": theme.faint, "lw": 0.6, "shrinkB": 5},
            annotation_clip=False,
        )
    if any(rate.budget < 1 for row in rows for rate in row.rates):
        axes.text(
            0.02,
            0.02,
            "open: after a part of the training",
            transform=axes.transAxes,
            color=theme.faint,
            fontsize=8,
        )


def _line(axes: Axes, row: RankOutcome, index: int, is_chosen: bool, theme: Theme) -> tuple[float, float]:
    """Draw a rank; returns the point at the right that its name belongs to."""
    colour = theme.chosen if is_chosen else _colour(index, theme)
    marker = MARKERS[index % len(MARKERS)]
    full = [
        (r.learning_rate, r.metric, r.spread or 0.0)
        for r in row.rates
        if r.budget == 1 and r.metric is not None
    ]
    part = [(r.learning_rate, r.metric) for r in row.rates if r.budget < 1 and r.metric is not None]
    if full:
        x, y, spread = zip(*full, strict=True)
        axes.plot(
            x,
            y,
            color=colour,
            lw=2.4 if is_chosen else 1.6,
            ls=DASHES[index % len(DASHES)],
            marker=marker,
            ms=6,
            zorder=3,
        )
        low = [value - one for value, one in zip(y, spread, strict=True)]
        high = [value + one for value, one in zip(y, spread, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0, zorder=1)
    if part:
        axes.plot(*zip(*part, strict=True), ls="none", marker=marker, ms=6, mfc="none", mec=colour, zorder=2)
    return max([*((a, b) for a, b, _ in full), *part])


class _Priced(NamedTuple):
    """A rank whose cost and metric are known; its place among all ranks decides colour and mark."""

    place: int
    rank: int
    cost: float
    metric: float
    spread: float | None


def by_price(
    axes: Axes,
    result: SweepResult,
    rows: Sequence[RankOutcome],
    chosen: int,
    priced: tuple[str, Sequence[float | None]],
    theme: Theme,
) -> None:
    """The metric of each rank against what its training costs; a line joins those that are worth their price.

    Args:
        axes: The panel.
        result: The sweep.
        rows: One a rank.
        chosen: The chosen rank.
        priced: What is counted as the price, and that of each rank; None where it is not known.
        theme: The colours.
    """
    label, prices = priced
    prepare(axes, theme)
    title(axes, f"{result.metric} against its price", label, theme)
    known = [
        _Priced(index, row.rank, cost, row.metric, row.spread)
        for index, (row, cost) in enumerate(zip(rows, prices, strict=True))
        if cost is not None and row.metric is not None
    ]
    if not known:
        axes.set_xticks([])
        say_not_known(axes, theme)
        return
    costs = [one.cost for one in known]
    if len(costs) > 1 and min(costs):  # the axis does not start at zero, so that the points can be told apart
        more = percent(max(costs) / min(costs) - 1)
        axes.set_xlabel(f"{label}: the dearest takes {more} more than the cheapest", color=theme.ink)
    best = [known[place] for place in frontier([(one.cost, one.metric) for one in known], result.maximise)]
    axes.plot(
        [one.cost for one in best],
        [one.metric for one in best],
        color=theme.faint,
        lw=1.4,
        ls=(0, (5, 3)),
        zorder=1,
    )
    for one in known:
        _point(axes, one, is_chosen=one.rank == chosen, is_best=one in best, theme=theme)
        _name_below(axes, one, is_chosen=one.rank == chosen, maximise=result.maximise, theme=theme)
    axes.margins(x=0.12, y=0.16)
    if len(best) < len(known):
        axes.text(
            0.98,
            0.02,
            "open: another is better for less",
            transform=axes.transAxes,
            ha="right",
            color=theme.faint,
            fontsize=8,
        )


def _point(axes: Axes, one: _Priced, *, is_chosen: bool, is_best: bool, theme: Theme) -> None:
    colour = theme.chosen if is_chosen else _colour(one.place, theme)
    axes.errorbar(
        one.cost,
        one.metric,
        one.spread,
        fmt=MARKERS[one.place % len(MARKERS)],
        color=colour,
        mfc=colour if is_best else "none",
        ms=9 if is_chosen else 7,
        lw=1.2,
        capsize=4,
        zorder=3,
    )


def _name_below(axes: Axes, one: _Priced, *, is_chosen: bool, maximise: bool, theme: Theme) -> None:
    axes.annotate(
        f"r={one.rank}",
        (one.cost, one.metric),
        xytext=(8, -4 if maximise else 4),
        textcoords="offset points",
        va="top" if maximise else "bottom",
        color=theme.chosen if is_chosen else _colour(one.place, theme),
        fontsize=9,
        fontweight="bold" if is_chosen else "normal",
    )


def say_not_known(axes: Axes, theme: Theme) -> None:
    """What stands in a panel that nothing can be drawn in."""
    axes.set_yticks([])
    axes.text(0.03, 0.5, "not known", transform=axes.transAxes, color=theme.faint, fontsize=9)


def _colour(index: int, theme: Theme) -> str:
    return theme.lines[index % len(theme.lines)]
