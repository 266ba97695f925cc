"""How a saved adapter fits a base."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.config import ConfigFacts


@dataclass(frozen=True, slots=True)
class Misfit:
    """A tensor whose shape is not the one that the base asks for."""

    name: str
    found: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """What PEFT makes of the file on one base.

    Attributes:
        base: The base.
        base_name: The name that the base goes by, or None.
        config: The configuration on the base; None where there is none that could be asked about.
        misfits: Tensors of another shape than this base and configuration ask for.
        missing: Keys that PEFT looks for and that the file lacks, whatever they are called there.
        unused: Keys of the file, in PEFT's spelling, that nothing looks for.
        wanted: The keys that PEFT would write for this base and configuration.
        compared: Whether PEFT could be asked at all.
        loads: Whether PEFT finds a place for every tensor and a tensor for every place.
        wrapper: Part of the base's live names (``"_orig_mod"``) by which alone the keys of the file differ; else empty.
        read_by_load_adapter: Whether the adapter is for the same model with or without its head, whose
            ``load_adapter`` (transformers) then finds the places that PEFT does not.
        drops_named: Whether PEFT finds every tensor once the adapter's name is out of the keys, and not before.
        may_be_extended: Whether the base is known by nothing but the adapter's own name for it, so that its vocabulary
            may have been extended since.
    """

    base: BaseFacts
    base_name: str | None
    config: ConfigFacts | None
    misfits: tuple[Misfit, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    wanted: frozenset[str] = frozenset()
    compared: bool = False
    loads: bool = False
    wrapper: str = ""
    read_by_load_adapter: bool = False
    may_be_extended: bool = False
    drops_named: bool = False
