"""Repeated layers: which a trace can leave out because they are like the ones it keeps, and adapted alike."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

LONGEST_PERIOD = 8
"""Layers after which a pattern of layer kinds may repeat; five local and one global is the longest in use."""

KEPT = 5
"""Units that a trace keeps of a repeated run: two that the start may touch, two inner ones, and the last."""

FIRST_INNER, LAST_INNER = 2, 3
"""The kept units that stand for all between them; the gradient that ends in the first unit makes the second
one differ from those above it."""

_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")


class Cut(NamedTuple):
    """How runs of like layers are cut.

    Attributes:
        together: Layers that count as one; 0 for no cut.
        before, after: Units that stay at the start and at the end of a run, beside the two that stand for the rest.
    """

    together: int = 1
    before: int = FIRST_INNER
    after: int = KEPT - 1 - LAST_INNER


USUAL = Cut()


@dataclass(frozen=True)
class Stack:
    """A run of like units of layers, cut to ``KEPT`` of them, or to the two that stand for all of it.

    Attributes:
        units: Layers of each of ``KEPT`` units, in the order in which they run; none for one that is not kept.
        copies: Inner units of the whole run: those that the two kept inner ones stand for.
        number: Position among the stacks of the model.
    """

    units: tuple[tuple[nn.Module, ...], ...]
    copies: int
    number: int


class LayerList(NamedTuple):
    """A list of layers in a model, by names.

    Attributes:
        path: Where it is in the model.
        names: The layers' in the list.
        kinds: A number for each layer; like layers have the same.
        modules: The names in the model of each layer's modules, its own first.
    """

    path: str
    names: list[str]
    kinds: list[int]
    modules: list[list[str]]


class Run(NamedTuple):
    """Layers of one list that follow each other, by their names; every ``period`` of them are a unit like the next."""

    path: str
    names: tuple[str, ...]
    period: int


def layer_lists(model: nn.Module) -> list[LayerList]:
    """The outermost lists of layers in a model; what layers hold, experts for one, is not looked at."""
    found: list[LayerList] = []
    numbers: dict[Any, int] = {}
    for path, layers in _outermost_lists(model):
        names = list(layers._modules)
        kinds = [numbers.setdefault(_signature(layer), len(numbers)) for layer in layers]
        modules = [
            [f"{path}.{name}.{inner}" if inner else f"{path}.{name}" for inner, _ in layer.named_modules()]
            for name, layer in zip(names, layers, strict=True)
        ]
        found.append(LayerList(path, names, kinds, modules))
    return found


def runs_of(
    lists: list[LayerList], cut: Cut = USUAL, mark: Callable[[str], Hashable] | None = None
) -> tuple[Run, ...]:
    """Runs of like layers that are worth a cut.

    Args:
        lists: Those of a whole model.
        cut: More layers count as one where a layer holds what one further away frees.
        mark: What else tells one module from another, by its name: whether it will be adapted, for one.
    """
    found: list[Run] = []
    for path, names, numbers, modules in lists:
        kinds: list[Any] = [
            (number, *map(mark, within)) if mark is not None else number
            for number, within in zip(numbers, modules, strict=True)
        ]
        for start, period, count in _runs(kinds, cut.together):
            found.append(Run(path, tuple(names[start : start + period * count]), period))
    return tuple(found)


def take_out(model: nn.Module, runs: tuple[Run, ...], cut: Cut = USUAL) -> list[Stack]:
    """Take the inner layers of runs out of a model, which is changed; what stays keeps its name."""
    stacks: list[Stack] = []
    for path, names, period in runs:
        layers = model.get_submodule(path)
        count = len(names) // period
        units = [names[i * period : (i + 1) * period] for i in range(count)]
        for name in (name for unit in units[cut.before + 1 : count - 1 - cut.after] for name in unit):
            del layers._modules[name]
        places = (*range(cut.before + 1), *range(count - 1 - cut.after, count))
        kept = [tuple(layers.get_submodule(name) for name in units[place]) for place in places]
        none = [()] * (FIRST_INNER - cut.before), [()] * (KEPT - 1 - LAST_INNER - cut.after)
        stacks.append(Stack((*none[0], *kept, *none[1]), count - cut.before - cut.after, len(stacks)))
    return stacks


def cut_stacks(
    model: nn.Module, cut: Cut = USUAL, mark: Callable[[str], Hashable] | None = None
) -> list[Stack]:
    """Take the inner layers of long runs of like layers out of a model, which is changed; see ``runs_of``."""
    return take_out(model, runs_of(layer_lists(model), cut, mark), cut)


def _outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):  # what it holds, experts for one, is not cut
            yield inner, child
        else:
            yield from _outermost_lists(child, inner)


def _runs(kinds: list[Any], together: int) -> Iterator[tuple[int, int, int]]:
    """``(start, period, count)`` of the runs that are worth a cut, the longest and those on both sides of it."""
    start, period, count = _longest_run(kinds, together)
    if count <= KEPT:
        return
    end = start + period * count
    yield from _runs(kinds[:start], together)
    yield start, period, count
    yield from ((end + after, width, units) for after, width, units in _runs(kinds[end:], together))


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """What tells one layer from another but for its index: modules, shapes, and plain attributes."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, p.shape, p.dtype) for n, p in module._parameters.items() if p is not None),
            tuple((n, b.shape, b.dtype) for n, b in module._buffers.items() if b is not None),
            tuple((n, v) for n, v in vars(module).items() if isinstance(v, _PLAIN) and n not in _INDICES),
        )
        for name, module in layer.named_modules()
    )


_PLAIN = (int, float, str, bool, type(None))

_INDICES = frozenset({"layer_idx", "layer_id", "idx", "index"})


def _longest_run(kinds: list[Any], together: int) -> tuple[int, int, int]:
    """``(start, period, count)`` of the run of like units whose cut leaves the fewest layers."""
    best = (0, 1, 1)
    saved = 0
    for period in range(together, LONGEST_PERIOD + 1, together):
        start = 0
        for end in range(period, len(kinds) + 1):
            if end < len(kinds) and kinds[end] == kinds[end - period]:
                continue
            count = (end - start) // period
            if (count - KEPT) * period > saved:
                best, saved = (start, period, count), (count - KEPT) * period
            start = end - period + 1
    return best


def is_numbered(name: str) -> bool:
    """Whether a name means one layer by its number."""
    return bool(_NUMBERED.search(name))


def same_in_every_layer(config: LoraConfig) -> bool:
    """Whether a configuration cannot tell one layer from another by its number."""
    by_number = config.layers_to_transform or config.layer_replication or config.rank_pattern
    targets = config.target_modules
    expressions = isinstance(config.exclude_modules, str) or (
        isinstance(targets, str) and targets != "all-linear"
    )
    names = [config.exclude_modules, targets, *_other_names(config)]
    return not (by_number or expressions or any(map(is_numbered, _listed(*names))))


def marks(config: LoraConfig) -> Callable[[str], Hashable] | None:
    """What a configuration does to a module, by its name in the base; None where that cannot be asked.

    Two layers whose modules have the same marks are adapted alike.
    """
    if config.layer_replication or any(map(is_numbered, _listed(*_other_names(config)))):
        return None
    if same_in_every_layer(config):
        return lambda name: None
    tuners: Any = importlib.import_module("peft.tuners.tuners_utils")
    patterns: Any = importlib.import_module("peft.utils.other")
    asked = copy.copy(config)
    if asked.target_modules == "all-linear":
        asked.target_modules = ".*"  # of all linear layers it only leaves some out
    ranks: dict[str, int] = config.rank_pattern or {}

    def mark(name: str) -> Hashable:
        taken = bool(tuners.check_target_module_exists(asked, name))
        return taken and (True, ranks.get(patterns.get_pattern_key(ranks.keys(), name)))

    return mark


def _other_names(config: LoraConfig) -> tuple[Any, Any]:
    return config.modules_to_save, getattr(config, "target_parameters", None)


def _listed(*groups: Any) -> list[str]:
    return [name for group in groups if group and not isinstance(group, str) for name in group]
