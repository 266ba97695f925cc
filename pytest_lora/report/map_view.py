"""An adapter map as a picture: one grid for each stack of layers, and the same in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pytest_lora.facts.figures import AdapterMap, CellState

STATES: dict[CellState, str] = {
    "live": "trains",
    "dead": "dead: no gradient reaches it",
    "missing": "no adapter here",
    "frozen": "frozen",
    "idle": "inactive, disabled or merged",
}
"""What the state of a cell is called, in the order of the legend."""

STATES_IN_A_FILE: dict[CellState, str] = {
    **STATES,
    "live": "holds an update",
    "dead": "holds nothing: a factor is all zero",
}
"""The same of a saved adapter, which trains no more."""


NARROW = 12
"""Layers of which two grids fit beside each other on a page."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One of the things that a map can be coloured by.

    Attributes:
        name: Its name on the page.
        values: The value of each cell.
        shades: The same from 0 to 1; None where there is no value.
        low: The smallest value, as text.
        high: The largest.
        unit: What the values are.
    """

    name: str
    values: tuple[Any, ...]
    shades: tuple[float | None, ...]
    low: str
    high: str
    unit: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: its state, and its shade in each plane; no state where the base has no such module."""

    state: CellState | None
    shades: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of one stack.

    Attributes:
        name: What the layers have in common (``"model.layers"``); empty for modules outside of layers.
        layers: Their numbers.
        lines: For each module its name and its cells, layer after layer.
        ticks: Which of the layers have their number written under them.
    """

    name: str
    layers: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]
    ticks: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring layers in which a module looks the same."""

    module: str
    layers: str
    state: str
    rank: str
    scaling: str
    gradient: str
    update: str


@dataclass(frozen=True, slots=True)
class MapView:
    """An adapter map, ready to be drawn.

    Attributes:
        planes: What it can be coloured by.
        first: Which of them is the most telling.
        stacks: Its grids.
        states: The states that occur, each with its words and how often.
        runs: The same as lines of a table.
    """

    planes: tuple[Plane, ...]
    first: int
    stacks: tuple[Stack, ...]
    states: tuple[tuple[CellState, str, int], ...]
    runs: tuple[Run, ...]

    @property
    def wide(self) -> bool:
        """Whether it needs the whole width of a page."""
        return any(len(stack.layers) > NARROW for stack in self.stacks)


def map_view(shown: AdapterMap) -> MapView:
    """Arrange a map for drawing."""
    planes = tuple(_planes(shown))
    width = len(shown.columns)
    stacks: list[Stack] = []
    runs: list[Run] = []
    for name, group in groupby(range(len(shown.rows)), key=lambda row: shown.rows[row].rpartition(".")[0]):
        rows = list(group)
        layers = tuple(shown.rows[row].rpartition(".")[2] for row in rows)
        lines: list[tuple[str, tuple[Cell, ...]]] = []
        for column, module in enumerate(shown.columns):
            places = [row * width + column for row in rows]
            if all(shown.states[place] is None for place in places):
                continue
            cells = (Cell(shown.states[place], tuple(p.shades[place] for p in planes)) for place in places)
            lines.append((module, tuple(cells)))
            runs += _runs(shown, module, layers, places)
        stacks.append(Stack(name, layers, tuple(lines), _ticks(layers)))
    counts = {state: shown.states.count(state) for state in STATES}
    rank, scaling, *measured = planes
    first = 2 if measured else 1 if rank.low == rank.high and scaling.low != scaling.high else 0
    return MapView(
        planes,
        first,
        tuple(stacks),
        tuple((state, words_of(shown)[state], number) for state, number in counts.items() if number),
        tuple(runs),
    )


def words_of(shown: AdapterMap) -> dict[CellState, str]:
    """What the states of its cells are called."""
    return STATES_IN_A_FILE if shown.saved else STATES


def _planes(shown: AdapterMap) -> Iterator[Plane]:
    yield _plane("Rank", shown.ranks, "rank")
    yield _plane("Scaling", shown.scalings, "scaling")
    if shown.gradients:
        yield _plane("Gradient", shown.gradients, "norm of the gradient at the last step", logarithmic=True)
    if shown.updates:
        what = "root mean square of lora_B" if shown.saved else "mean change of a weight at the last step"
        yield _plane("Update", shown.updates, what, logarithmic=True)


def _plane(name: str, values: tuple[Any, ...], unit: str, *, logarithmic: bool = False) -> Plane:
    known: list[float] = [
        v for v in values if v is not None and math.isfinite(v) and (v > 0 or not logarithmic)
    ]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def shade(value: float | None) -> float | None:
        if value is None:
            return None
        if not math.isfinite(value) or low == high:
            return 0.6 if value else 0.0
        if logarithmic:
            if value <= 0:
                return 0.0
            # A factor of ten is the least that spans the scale, or noise would look like a pattern.
            span = max(math.log10(high) - math.log10(low), 1.0)
            return round(1 - 0.9 * (math.log10(high) - math.log10(value)) / span, 2)
        return round(0.1 + 0.9 * (value / 2 - low / 2) / (high / 2 - low / 2), 2)

    return Plane(name, values, tuple(map(shade, values)), number(low, 3), number(high, 3), unit)


def _runs(shown: AdapterMap, module: str, layers: Sequence[str], places: Sequence[int]) -> Iterator[Run]:
    def looks(index: int) -> tuple[Any, ...]:
        place = places[index]
        return shown.states[place], shown.ranks[place], shown.scalings[place]

    for (state, rank, scaling), group in groupby(range(len(places)), key=looks):
        indices = list(group)
        if state is None:
            continue
        first, last = layers[indices[0]], layers[indices[-1]]
        yield Run(
            module=module,
            layers=first if first == last else f"{first} to {last}",
            state=words_of(shown)[state],
            rank=number(rank),
            scaling=number(scaling),
            gradient=_span(shown.gradients, [places[index] for index in indices]),
            update=_span(shown.updates, [places[index] for index in indices]),
        )


def _span(values: Sequence[float | None], places: Sequence[int]) -> str:
    known = [v for place in places if values and (v := values[place]) is not None]
    if not known:
        return ""
    low, high = number(min(known), 3), number(max(known), 3)
    return low if low == high else f"{low} to {high}"


def _ticks(layers: Sequence[str], most: int = 9) -> tuple[bool, ...]:
    step = next(
        s for s in (1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100, len(layers) or 1) if len(layers) <= s * most
    )
    return tuple(index % step == 0 for index in range(len(layers)))


def number(value: float | None, digits: int = 4) -> str:
    """A number as a reader wants it, a few digits of it."""
    if value is None:
        return ""
    return f"{value:.{digits}g}" if abs(value) < 1000 or value != value else f"{value:,.0f}"
