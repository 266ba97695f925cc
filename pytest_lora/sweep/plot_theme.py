"""Colours of the pictures of a sweep, and axes in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
