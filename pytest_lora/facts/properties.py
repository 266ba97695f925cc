"""Adapters beside what a test pins down to a number: share of parameters, scaling, shapes, modules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_lora.facts.steps import UpdateFacts

SAME_SCALING = 1e-6
"""Relative difference below which two scalings are the same; they are quotients of doubles."""


@dataclass(frozen=True, slots=True)
class ParameterShareFacts:
    """The share of trainable among all logical parameters, beside a band.

    Attributes:
        model: Class of the model.
        trainable: Trainable parameters.
        adapter: Parameters of the adapters.
        total: All parameters, packed ones counted as what they stand for.
        stored: Numbers that are stored; fewer where weights are packed.
        low: Smallest share that is asked for, as a fraction.
        high: Largest share that is asked for, as a fraction.
    """

    model: str
    trainable: int
    adapter: int
    total: int
    stored: int
    low: float
    high: float

    @property
    def percent(self) -> float:
        """The share in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    @property
    def stored_percent(self) -> float:
        """The share that a tool prints which takes packed weights for numbers."""
        return 100 * self.trainable / self.stored if self.stored else 0.0

    @property
    def packed(self) -> bool:
        """Whether storage holds fewer numbers than there are parameters."""
        return self.stored < self.total

    @property
    def inside(self) -> bool:
        """Whether the share lies in the band."""
        return self.low * self.total <= self.trainable <= self.high * self.total


@dataclass(frozen=True, slots=True)
class ModuleScaling:
    """One value of the effective scaling, and where it is.

    Attributes:
        where: The modules, in words.
        scaling: The scaling.
        alpha: The alpha that it comes from.
        rank: The rank.
        use_rslora: Whether alpha is divided by the root of the rank.
    """

    where: str
    scaling: float
    alpha: float
    rank: int
    use_rslora: bool

    @property
    def divisor(self) -> float:
        """``r``, under rsLoRA ``sqrt(r)`` (arXiv:2106.09685, arXiv:2312.03732)."""
        return math.sqrt(self.rank) if self.use_rslora else self.rank

    @property
    def configured(self) -> float:
        """The scaling that alpha and rank give."""
        return self.alpha / self.divisor


@dataclass(frozen=True, slots=True)
class ScalingFacts:
    """The effective scaling of every adapted module, beside one number."""

    scalings: tuple[ModuleScaling, ...]
    expected: float


@dataclass(frozen=True, slots=True)
class ShapeMisfit:
    """Factors of one wrong shape.

    Attributes:
        modules: The modules that have it.
        observed: The factor and its shape, as in ``"lora_A is 8 x 64"``.
        expected: The shape that rank and base weight ask for.
    """

    modules: tuple[str, ...]
    observed: str
    expected: str


@dataclass(frozen=True, slots=True)
class ShapeFacts:
    """The factors of every adapter, beside the rank and the base weight."""

    misfits: tuple[ShapeMisfit, ...]


@dataclass(frozen=True, slots=True)
class UpdateRankFacts:
    """The rank of what some real steps changed, beside the rank of the adapters.

    Attributes:
        model: Class of the model.
        steps: Steps that were taken.
        updates: What changed, module by module.
    """

    model: str
    steps: int
    updates: tuple[UpdateFacts, ...]


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """The modules that are adapted, beside those that a test names.

    Attributes:
        targets: What the test names, as it is written in Python.
        unknown: Names that fit no module, with the nearest names that do.
        missing: Modules that are named and not adapted.
        unexpected: Modules that are adapted and not named.
        adapted: Names by which a test would mean what is adapted: last parts where these are enough.
    """

    targets: str
    unknown: tuple[tuple[str, tuple[str, ...]], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    adapted: tuple[str, ...]
