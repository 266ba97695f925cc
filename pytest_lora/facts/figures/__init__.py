"""What travels with findings for a reader to look at: maps, curves, budgets, sweeps. Plain numbers and strings only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, repeat
from typing import Any, ClassVar, Literal

from pytest_lora.facts.figures.recipes import RecipeCard, SettingRow

CellState = Literal["live", "frozen", "idle", "dead", "missing"]
"""How an adapter stands on a module: it takes part and trains; it takes part and is frozen; it is inactive, disabled or
merged; it is to train and no gradient reaches it, or a file holds nothing but zeros for it; this module does not carry
it, and others of its kind do."""


@dataclass(frozen=True, slots=True)
class AdapterMap:
    """One adapter on its base: layers down, kinds of modules across.

    The cells are five columns of equal length, row by row; ``cell`` reads one of them.

    Attributes:
        base: Class of the base model, and how it is quantized (``"LlamaForCausalLM in 4bit"``).
        adapter: Name of the adapter.
        rows: Where the layers are (``"model.layers.0"``); ``""`` for modules outside of them.
        columns: What is adapted in them (``"self_attn.q_proj"``); several experts of one layer are one column.
        states: How the adapter stands on each module; None where the base has no such module.
        ranks: The rank; None where there is no adapter. Of several experts the smallest.
        scalings: What the low-rank product is multiplied with. Of several experts the smallest.
        gradients: L2 norm of the gradient of the factors at the last step that was taken; empty where none was.
        updates: Root mean square of what that step changed the factors by; empty where none was taken. Of a saved
            adapter, root mean square of ``lora_B``, which starts at zero.
        trainable_parameters: Numbers in the whole model that require gradients; those in the file of a saved adapter.
        total_parameters: All numbers in the model, packed ones counted as what they stand for; 0 where it is not known.
        saved: Whether this is an adapter in a file.
    """

    kind: ClassVar[str] = "adapter_map"

    base: str
    adapter: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    states: tuple[CellState | None, ...]
    ranks: tuple[int | None, ...]
    scalings: tuple[float | None, ...]
    gradients: tuple[float | None, ...]
    updates: tuple[float | None, ...]
    trainable_parameters: int
    total_parameters: int
    saved: bool = False

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable_parameters / self.total_parameters if self.total_parameters else 0.0

    def column(self, name: str, values: Sequence[Any]) -> tuple[Any, ...]:
        """The entries of one of the five tuples that belong to a column, from the first row to the last."""
        return tuple(values[self.columns.index(name) :: len(self.columns)])


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Losses of a run, and what of them was judged.

    Attributes:
        title: What was run.
        steps: Optimizer steps done when the loss of the same place was taken; long runs are thinned.
        losses: Training losses, which may be NaN or infinite.
        eval_steps: The same for losses on held-out data.
        eval_losses: These losses.
        window: First and last step that were judged.
        before: Level of the loss at the start of the window; None where nothing could be measured.
        after: Level at its end.
        wanted: Relative drop that was asked for; None where none was.
    """

    kind: ClassVar[str] = "loss_curve"

    title: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    eval_steps: tuple[int, ...]
    eval_losses: tuple[float, ...]
    window: tuple[int, int]
    before: float | None
    after: float | None
    wanted: float | None

    @property
    def drop(self) -> float | None:
        """Relative drop from ``before`` to ``after``; None where it cannot be told."""
        if not self.before or self.after is None:
            return None
        drop = (self.before - self.after) / self.before
        return drop if math.isfinite(drop) else None


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change that was estimated: as one would write it, its peak in bytes, and whether that fits."""

    change: str
    peak: int
    fits: bool


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory of a training step against what there is, in bytes.

    Attributes:
        title: The step: base, batch, rank, quantization.
        breakdown: What the peak is made of, by category.
        peak_allocated: The predicted peak.
        peak_reserved: What the allocator would reserve for it.
        budget: What there is.
        peak_at: Phase and operation of the peak.
        what_if: Other settings that were tried, the smallest change first.
        measured: The peak that was measured, if any was.
    """

    kind: ClassVar[str] = "memory_budget"

    title: str
    breakdown: tuple[tuple[str, int], ...]
    peak_allocated: int
    peak_reserved: int
    budget: int
    peak_at: str
    what_if: tuple[WhatIf, ...]
    measured: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return self.peak_allocated <= self.budget


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A rank at one learning rate.

    Attributes:
        rate: The learning rate.
        metric: Mean of the metric over the seeds; None where every trial failed.
        spread: Standard deviation over the seeds; None for a single one.
        full: Whether it had the full training; halving drops rates after a part of it.
    """

    rate: float
    metric: float | None
    spread: float | None
    full: bool = True


@dataclass(frozen=True, slots=True)
class RankTrial:
    """One rank of a sweep, at its best learning rate.

    Attributes:
        rank: The rank.
        metric: Mean of the metric over the seeds; None where the trial came to nothing.
        spread: Standard deviation over the seeds; None for a single one.
        seconds: Of training, the mean.
        flops: Floating-point operations of training; None where they were not counted.
        peak_bytes: Peak of GPU memory, measured or else estimated; None where neither is known.
        trainable_parameters: Numbers that require gradients.
        problem: Why there is no metric, in words; empty where there is one.
        rate: The best learning rate; None in a sweep over ranks alone.
        rates: Every rate that was tried, ascending; empty in a sweep over ranks alone.
    """

    rank: int
    metric: float | None
    spread: float | None
    seconds: float
    flops: float | None
    peak_bytes: int | None
    trainable_parameters: int
    problem: str = ""
    rate: float | None = None
    rates: tuple[RatePoint, ...] = ()


@dataclass(frozen=True, slots=True)
class RankSweep:
    """Ranks compared, and the one that was chosen.

    Attributes:
        title: What was trained.
        metric: Name of the metric.
        maximise: Whether more of it is better.
        trials: A row a rank, ascending.
        chosen: The rank chosen, or None.
        reasons: Why, a sentence each.
        enough: The metric at which the metric rule is content; None where it was not judged.
    """

    kind: ClassVar[str] = "rank_sweep"

    title: str
    metric: str
    maximise: bool
    trials: tuple[RankTrial, ...]
    chosen: int | None
    reasons: tuple[str, ...]
    enough: float | None = None


Figure = AdapterMap | LossCurve | MemoryBudget | RankSweep | RecipeCard

_KINDS: dict[str, type[Any]] = {
    one.kind: one for one in (AdapterMap, LossCurve, MemoryBudget, RankSweep, RecipeCard)
}
_PACKED = ("states", "ranks", "scalings", "gradients", "updates")
_FLOATS = ("losses", "eval_losses", "scalings", "gradients", "updates", "before", "after", "enough")
_TRIAL_FLOATS = ("metric", "spread", "seconds", "flops")


def to_plain(figure: Figure) -> dict[str, Any]:
    """A figure as JSON can hold it: runs of equal cells once, and NaN and infinity as words."""
    fields = asdict(figure)
    for name in _PACKED if isinstance(figure, AdapterMap) else ():
        fields[name] = [[value, len(list(run))] for value, run in groupby(fields[name])]
    return {"kind": figure.kind, **{name: _worded(value) for name, value in fields.items()}}


def from_plain(data: Mapping[str, Any]) -> Figure:
    """The figure that ``to_plain`` took apart.

    Raises:
        ValueError: There is no such kind.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"there is no figure of kind {kind!r}; known are {', '.join(_KINDS)}")
    if kind == AdapterMap.kind:
        for name in _PACKED:
            fields[name] = chain.from_iterable(repeat(value, count) for value, count in fields[name])
    for name in _FLOATS:
        if name in fields:
            fields[name] = _number(fields[name])
    if kind == MemoryBudget.kind:
        fields["what_if"] = [WhatIf(**one) for one in fields["what_if"]]
    if kind == RankSweep.kind:
        fields["trials"] = [_trial(one) for one in fields["trials"]]
    if kind == RecipeCard.kind:
        fields["rows"] = [SettingRow(**one) for one in fields["rows"]]
    made: Figure = _KINDS[kind](**{name: _tupled(value) for name, value in fields.items()})
    return made


def _trial(data: Mapping[str, Any]) -> RankTrial:
    rates = tuple(RatePoint(**_numbered(one, ("rate", "metric", "spread"))) for one in data.get("rates", ()))
    return RankTrial(**{**_numbered(data, _TRIAL_FLOATS), "rate": _number(data.get("rate")), "rates": rates})


def _numbered(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {**data, **{name: _number(data[name]) for name in names}}


def _worded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_worded(one) for one in value]
    if isinstance(value, dict):
        return {name: _worded(one) for name, one in value.items()}
    return value


def _number(value: Any) -> Any:
    """A number, or several, of which some may be words."""
    if isinstance(value, str):
        return float(value)
    return tuple(_number(one) for one in value) if isinstance(value, Iterable) else value


def _tupled(value: Any) -> Any:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(_tupled(one) for one in value)
    return value
