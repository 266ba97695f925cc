"""What a model did when it was saved and loaded, merged, padded or switched off, on copies of it; and its adapters
beside what a test pins down to a number: share of parameters, scaling, shapes, modules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_lora.facts.model_parts import LateAdapter
from pytest_lora.facts.steps import UpdateFacts


@dataclass(frozen=True, slots=True)
class ReloadFacts:
    """An adapter that was saved, and loaded on a fresh base.

    Attributes:
        refusal: What loading raised; None where it loaded, and the rest is known.
        lost: Trained tensors that are not in the saved adapter.
        changed: Tensors of the adapter with other values or shapes after loading.
        foreign: Tensors of the given base that differ from those under the adapter.
        merged: Those of them that differ by what the active adapters add to them.
        rounded: Tensors of the given base that rounding alone tells from those under the adapter.
        recast: Tensors of the adapter with the same values in another dtype.
        dtypes: Dtype of the first of these before and after; None where there is none.
        apart: Largest difference of the outputs; 0 where they are equal bit for bit.
    """

    refusal: str | None = None
    lost: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    recast: tuple[str, ...] = ()
    dtypes: tuple[str, str] | None = None
    apart: float = 0.0

    @property
    def tensors_differ(self) -> bool:
        """Whether a tensor explains a difference of the outputs."""
        return bool(self.lost or self.changed or self.foreign or self.rounded or self.recast)


@dataclass(frozen=True, slots=True)
class MergeFacts:
    """Adapters that were merged, unmerged and unloaded.

    Attributes:
        refusal: What PEFT raised for the merge; None where it merged.
        unmerged: LoRA layers that were not merged then.
        quantized: LoRA layers over quantized weights.
        apart: Largest difference of the output after the merge.
        effect: Largest difference that the adapter itself makes.
        tolerance: The relative tolerance, and the difference that it allows here.
        damaged: Tensors that unmerging did not restore.
        restored_steps: Rounding steps within which a tensor counts as restored.
        left_over: Tensors of the base that differ after ``unload()``.
        unchanged: Share of the numbers of adapted weights that the merge left as they were though the update there is
            not zero; None where that was not measured.
        dtypes: Dtypes of those weights.
        biases: LoRA layers whose merged bias is not the old one and ``scaling`` times the adapter's (``lora_bias``).
    """

    refusal: str | None = None
    unmerged: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    apart: float = 0.0
    effect: float = 0.0
    tolerance: tuple[float, float] = (0.0, 0.0)
    damaged: tuple[str, ...] = ()
    restored_steps: int = 0
    left_over: tuple[str, ...] = ()
    unchanged: float | None = None
    dtypes: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leak:
    """A second adapter that changes the output of the first.

    Attributes:
        adapters: The adapters that were active.
        apart: Largest difference of their output.
        when: After what.
    """

    adapters: tuple[str, ...]
    apart: float
    when: str


@dataclass(frozen=True, slots=True)
class LawFacts:
    """How far a model is from the laws of LoRA; None for a law that it keeps, or that does not apply.

    Attributes:
        disabled: Largest difference between the output with adapters disabled and that of the base.
        zeroed: Largest difference that adapters with ``lora_B = 0`` make.
        nonlinear: LoRA layers that do not act in proportion to the scaling, and how far each is off.
        padded: LoRA layers that act otherwise with zeros padded to their rank, and how far each is off.
        leak: A second adapter that changes the first.
        loads_as_it_is: Whether saving and loading it is meant to be exact.
        not_added: Why no second adapter could be added beside the first; None where one was, or none belongs there.
    """

    disabled: float | None = None
    zeroed: float | None = None
    nonlinear: tuple[tuple[str, float], ...] = ()
    padded: tuple[tuple[str, float], ...] = ()
    leak: Leak | None = None
    loads_as_it_is: bool = True
    not_added: str | None = None


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """A weight that is not the same on all ranks.

    Attributes:
        name: Its name.
        ranks: Ranks on which it is unlike on rank 0.
        kind: ``"missing"`` (some ranks lack it), ``"form"`` (another shape or dtype) or ``"values"``.
        largest: Largest difference of its values; None for the other kinds.
        zero: Ranks on which every number of it is zero.
    """

    name: str
    ranks: tuple[int, ...]
    kind: str
    largest: float | None
    zero: tuple[int, ...] = ()

    @property
    def starts_at_zero(self) -> bool:
        """Whether it is the factor that moves away from zero in the first step."""
        return any(f".{part}." in f".{self.name}." for part in ("lora_B", "lora_embedding_A"))


@dataclass(frozen=True, slots=True)
class SyncFacts:
    """The adapter on all ranks of a process group.

    Attributes:
        ranks: Number of ranks.
        weights: Number of weights that were compared.
        differences: Those that differ.
        late: Adapters that were put in after a wrapper was made.
    """

    ranks: int
    weights: int
    differences: tuple[WeightDifference, ...]
    late: tuple[LateAdapter, ...] = ()


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
