"""From facts to maps of an adapter: what a check has seen anyway, arranged by layer and kind of module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Literal

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.figures import AdapterMap, CellState
from pytest_lora.facts.model_parts import LayerState

if TYPE_CHECKING:
    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.facts.config import ConfigFacts
    from pytest_lora.facts.model import ModelFacts
    from pytest_lora.facts.saved_tensors import AdaptedModule
    from pytest_lora.facts.settings import Settings
    from pytest_lora.facts.steps import TensorFacts
    from pytest_lora.facts.training import TrainingFacts

SHOWN_ADAPTERS = 8
"""Maps of one model; of more adapters the active ones come first."""

_LAYER = re.compile(r"\d(?<![^.]\d)\d*(?=\..)", re.DOTALL)
"""The number of a layer: the first part of digits alone, with something after it."""

_EXPERT = re.compile(r"\bexperts\.\d+\b")

MOST_CELLS = 20_000
"""Cells of a map of a file: what a file names need not be layers of anything, and may be a million names."""

Cell = tuple[CellState, int | None, float | None, float | None, float | None]
"""State, rank, scaling, gradient and update."""


def model_maps(facts: ModelFacts, training: TrainingFacts | None = None) -> tuple[AdapterMap, ...]:
    """A map of each adapter of a live model; of the steps that it took too, where there were any."""
    steps = _Steps(training)
    wanted = dict.fromkeys((*facts.active, *facts.adapters))
    return tuple(
        _mapped(
            facts.base,
            facts.base.title,
            adapter,
            (
                (layer.module, (_state(layer, facts, steps), layer.rank, layer.scaling, *steps.of(layer)))
                for layer in facts.of(adapter)
            ),
            facts.trainable_parameters,
            facts.total_parameters,
        )
        for adapter in list(wanted)[:SHOWN_ADAPTERS]
        if facts.of(adapter)
    )


def config_maps(facts: ConfigFacts) -> tuple[AdapterMap, ...]:
    """A map of the adapter that a configuration makes; none where PEFT refuses it."""
    if not facts.layers:
        return ()
    state: CellState = "frozen" if facts.settings.inference_mode else "live"
    return (
        _mapped(
            facts.base,
            facts.base.title,
            facts.adapter,
            ((layer.module, (state, layer.rank, layer.scaling, None, None)) for layer in facts.layers),
            facts.trainable_parameters,
            facts.base.parameters + facts.trainable_parameters,
        ),
    )


def checkpoint_maps(facts: CheckpointFacts) -> tuple[AdapterMap, ...]:
    """A map of a saved adapter; none where its file holds no LoRA that can be told apart, or names without order."""
    if not facts.is_judged:
        return ()
    modules = [one.name.removesuffix(".base_layer") for one in facts.adapted]
    places = {place(module) for module in modules}
    if not places or len({row for row, _ in places}) * len({column for _, column in places}) > MOST_CELLS:
        return ()
    cells = [(name, _saved(one, facts.settings)) for name, one in zip(modules, facts.adapted, strict=True)]
    numbers = facts.lora_numbers
    if facts.fit is not None and not facts.is_foreign:
        base = facts.fit.base
        mapped = _mapped(base, base.title, facts.name, cells, numbers, base.parameters + numbers)
    else:
        named = facts.config and (facts.config.base_class or facts.config.base)
        mapped = _mapped(None, named or "a base that is not given", facts.name, cells, numbers, 0)
    return (replace(mapped, saved=True),)


def _saved(module: AdaptedModule, settings: Settings | None) -> Cell:
    rank = module.rank
    scaling = None if settings is None else settings.scaling_of(module.name)
    size = module.b.values.rms if module.b and module.b.values else None
    state: CellState = "dead" if module.holds_nothing else "live"
    return state, rank, scaling, None, None if size is None else _rounded(size)


def _why_silent(training: TrainingFacts | None, layer: LayerState) -> str | None:
    # Facts of a training are loaded where there is one.
    from pytest_lora.facts.model_parts import why_silent

    return None if training is None else why_silent(training, layer)


class _Steps:
    """What the last step showed of each adapter on each module."""

    def __init__(self, training: TrainingFacts | None) -> None:
        self._known: dict[tuple[str, str], list[TensorFacts]] = {}
        taken = training is not None and bool(training.steps)
        for tensor in training.tensors if training and taken else ():
            if tensor.part in ("a", "b"):
                self._known.setdefault((tensor.module, tensor.adapter), []).append(tensor)
        judged = training.unlearning if training and taken and training.judges_gradients else ()
        self._silent = {
            (layer.module, layer.adapter)
            for layer in judged
            # Data of a few steps does not reach every expert.
            if not layer.in_expert or _why_silent(training, layer)
        }

    def unreached(self, layer: LayerState) -> bool:
        """Whether steps were taken and no gradient came here, which other data would not change."""
        return (layer.module, layer.adapter) in self._silent

    def of(self, layer: LayerState) -> tuple[float | None, float | None]:
        """Norm of the gradient, and size of the update; None where no step was taken."""
        tensors = self._known.get((layer.module, layer.adapter))
        if not tensors:
            return None, None
        gradient = math.hypot(*filter(None, (t.gradients[-1] for t in tensors if t.gradients)))
        numbers = sum(t.numbers for t in tensors)
        moved = sum(t.moves[-1] ** 2 * t.numbers for t in tensors if t.moves)
        return _rounded(gradient), _rounded(math.sqrt(moved / numbers) if numbers else 0.0)


def _state(layer: LayerState, facts: ModelFacts, steps: _Steps) -> CellState:
    if layer.adapter not in facts.active or not layer.active or layer.disabled or layer.merged:
        return "idle"
    if not layer.trainable:
        return "frozen"
    if not layer.can_learn or layer.scaling == 0 or steps.unreached(layer):
        return "dead"
    return "live"


def _mapped(
    base: BaseFacts | None,
    named: str,
    adapter: str,
    modules: Iterable[tuple[str, Cell]],
    trainable: int,
    total: int,
) -> AdapterMap:
    """Arrange an adapter's modules by layer and kind; without a base none is missing."""
    cells: dict[tuple[str, str], list[Cell]] = {}
    for module, cell in modules:
        cells.setdefault(place(module), []).append(cell)
    adapted = {column for _, column in cells}
    stacks = {_stack(row) for row, _ in cells}
    # In the order of the base; fused parameters are no modules of it.
    names = chain((m.name for m in base.modules), (p.name for p in base.fused)) if base else ()
    known = [place(name) for name in names]
    places = [place for place in known if place[1] in adapted and _stack(place[0]) in stacks]
    places += cells
    rows = tuple(dict.fromkeys(row for row, _ in places))
    columns = tuple(dict.fromkeys(column for _, column in places))
    exists = set(places)
    grid = [cells.get((row, column), ()) for row in rows for column in columns]
    missing = [(row, column) in exists for row in rows for column in columns]
    return AdapterMap(
        base=named,
        adapter=adapter,
        rows=rows,
        columns=columns,
        states=tuple(
            _worst(one[0] for one in found) if found else "missing" if lacks else None
            for found, lacks in zip(grid, missing, strict=True)
        ),
        ranks=tuple(min((one[1] for one in found if one[1] is not None), default=None) for found in grid),
        scalings=tuple(
            min((_rounded(one[2]) for one in found if one[2] is not None), default=None) for found in grid
        ),
        gradients=_means(grid, 3),
        updates=_means(grid, 4),
        trainable_parameters=trainable,
        total_parameters=total,
    )


@lru_cache(8192)
def place(module: str) -> tuple[str, str]:
    """The layer that a module is in, and its name there."""
    name = _EXPERT.sub("experts.*", module) if "experts." in module else module
    found = _LAYER.search(name)
    return (name[: found.end()], name[found.end() + 1 :]) if found else ("", name)


def _stack(row: str) -> str:
    """Which stack of layers it is, of several as in an encoder and a decoder."""
    return row.rpartition(".")[0]


_GRAVITY: Mapping[CellState, int] = {"dead": 0, "idle": 1, "frozen": 2, "live": 3, "missing": 4}


def _worst(states: Iterable[CellState]) -> CellState:
    return min(states, key=_GRAVITY.__getitem__)


def _means(grid: Sequence[Sequence[Cell]], part: Literal[3, 4]) -> tuple[float | None, ...]:
    """The mean of a part of each cell; nothing where none has it."""
    means = tuple(_mean(one[part] for one in found) for found in grid)
    return means if any(mean is not None for mean in means) else ()


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(sum(known) / len(known)) if known else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
