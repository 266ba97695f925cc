"""A saved adapter beside the configuration under which training is to go on."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_lora.facts.settings import Settings


@dataclass(frozen=True, slots=True)
class RankChange:
    """Modules of another rank.

    Attributes:
        now: The rank that the configuration gives them.
        before: The rank that they have in the checkpoint.
        modules: Their names.
    """

    now: int
    before: int
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A field with another value, as both are written in Python."""

    field: str
    now: str
    before: str


@dataclass(frozen=True, slots=True)
class ResumptionFacts:
    """What differs between a checkpoint and a configuration.

    Attributes:
        name: Name of the checkpoint.
        weights: Its file of weights.
        unusable: Why it holds no LoRA adapter that can be read; None where it does, and the rest is known.
        ranks: Modules of another rank.
        gone: Modules (or parameters) of the checkpoint that the configuration does not adapt.
        new: Modules (or parameters) that it adapts and the checkpoint does not hold.
        alpha: The first module of another alpha: its name, the alpha now and before.
        base: The base of the configuration and that of the checkpoint, where they differ.
        fields: Fields that decide which tensors there are or how they are scaled, where they differ.
        saved: The configuration of the checkpoint; None where it is not usable.
    """

    name: str
    weights: str | None
    unusable: str | None = None
    ranks: tuple[RankChange, ...] = ()
    gone: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    alpha: tuple[str, float, float] | None = None
    base: tuple[str, str] | None = None
    fields: tuple[FieldChange, ...] = ()
    saved: Settings | None = None

    @property
    def where(self) -> str:
        """The file that is compared."""
        return f"{self.weights} in {self.name}"
