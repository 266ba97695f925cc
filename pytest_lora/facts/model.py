"""Facts about a live model that carries LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.model_parts import Factor as Factor
from pytest_lora.facts.model_parts import LayerState as LayerState
from pytest_lora.facts.model_parts import Wrappers


@dataclass(frozen=True, slots=True)
class CombinedAdapter:
    """An adapter whose factors are a sum of those of others (``add_weighted_adapter``).

    Attributes:
        adapter: Its name.
        sources: Adapters that it was summed of.
        kinds: What its configuration took over from them and the sum does not carry: ``"use_rslora"``, ``"use_dora"``,
            ``"lora_bias"``, ``"kasa_config"``.
        scaling: Its scaling in effect; the sum holds all scalings in its factors, so that 1 is right.
        subtracted: Those of its sources that have a negative weight, where each factor is a sum by itself.
        missed: Norm of what such an update has besides the weighted sum of the updates of its sources, over the norm
            of that sum.
    """

    adapter: str
    sources: tuple[str, ...]
    kinds: tuple[str, ...]
    scaling: float
    subtracted: tuple[str, ...] = ()
    missed: float = 0.0


@dataclass(frozen=True, slots=True)
class SavedModule:
    """A full copy of a base module that one adapter trains (``modules_to_save``).

    Attributes:
        module: Name of the module in the base.
        adapter: Name of the adapter that owns the copy.
        trainable: Whether all of the copy requires gradients.
        finite: Whether every number is finite; None on the meta device.
        shape: Shape of the copy's first parameter that differs from the original's, else of its first.
        original_shape: Shape of the same parameter of the original.
        dtype: Dtype of the copy's first parameter.
        active: Whether the copy takes part in the forward pass.
        disabled: Whether all copies are switched off here.
        tied: Other modules that shared the original's weight and do not share the copy's.
        tied_by_loading: Whether this transformers ties the two again as it loads a merged model in which they differ.
        is_orphaned: Whether neither a LoRA layer nor a configuration knows its adapter any more.
    """

    module: str
    adapter: str
    trainable: bool
    finite: bool | None
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]
    dtype: str
    active: bool
    disabled: bool
    tied: tuple[str, ...]
    tied_by_loading: bool
    is_orphaned: bool = False

    @property
    def field(self) -> str:
        """The field of the LoraConfig that asks for it."""
        return "modules_to_save"


@dataclass(frozen=True, slots=True)
class InitialRows:
    """Rows at the end of an embedding or head that still are what ``resize_token_embeddings`` made them.

    Attributes:
        module: Name of the embedding or head.
        first: The first of them.
        count: How many there are.
        padding: Whether the only one is the padding token, which nothing learns from.
    """

    module: str
    first: int
    count: int
    padding: bool = False


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """Single rows of an embedding that one adapter trains (``trainable_token_indices``).

    Attributes:
        module: Name of the embedding in the base.
        adapter: Name of the adapter that owns the rows.
        rows: How many there are.
        trainable: Whether they require gradients.
        finite: Whether every number is finite; None on the meta device.
        dtype: ``"float32"``, ``"bfloat16"``, ...
        active: Whether the rows take part in the forward pass.
    """

    module: str
    adapter: str
    rows: int
    trainable: bool
    finite: bool | None
    dtype: str
    active: bool

    @property
    def field(self) -> str:
        """The field of the LoraConfig that asks for them."""
        return "trainable_token_indices"


@dataclass(frozen=True, slots=True)
class TrainableBase:
    """A parameter of the base that requires gradients though no adapter owns it."""

    name: str
    parameters: int


@dataclass(frozen=True, slots=True)
class CollidingName:
    """An adapter whose name is also a part of the names of modules.

    Attributes:
        adapter: Its name.
        part: The module, or the factor, that has the same name.
        lost: Keys of any adapter that PEFT leaves out or spoils when it saves this model; empty where all are right.
        adapters: Adapters that these belong to.
    """

    adapter: str
    part: str
    lost: tuple[str, ...]
    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model with LoRA adapters.

    Attributes:
        base: The base model.
        configs: The configuration of each adapter, as far as the model still knows it.
        layers: Every adapter on every module.
        saved: Full copies that adapters train.
        rows: Single embedding rows that adapters train.
        trainable_base: Base parameters that require gradients.
        nonfinite_base: Base parameters that hold NaN or infinity.
        inference_base: Base parameters that were made under ``torch.inference_mode()``.
        adapters: Names of all LoRA adapters.
        active: Names of the active ones.
        nested: How many PEFT models are wrapped inside each other (1 is healthy).
        training: Whether the model as a whole is in training mode.
        base_dropouts: Modules of the base whose dropout, above zero, is in training mode.
        trainable_parameters: Logical numbers that require gradients.
        total_parameters: Logical numbers in the model, adapters included.
        stored_parameters: The same, with packed 4-bit weights counted as they are stored.
        duplicates: Pairs of adapters that are active together and hold the same numbers wherever they are.
        reentrant_without_inputs: Reentrant gradient checkpointing is on and nothing makes its input require
            gradients, so that no gradient reaches an adapter inside.
        wrappers: What wraps it to train in several processes, or to compile it.
        colliding: Adapters whose names are also names of modules.
        trains_xlora: Whether a classifier of X-LoRA trains, which weighs adapters that are frozen by design.
        initial_rows: Rows of the vocabulary that were added and never trained.
        shared: Pairs of adapters whose factors are the same tensors wherever both are.
        combined: Adapters that were summed of others whose kind the sum does not carry.
        zero_base: Numbered blocks of the base that hold zeros alone, and its embeddings where they do.
        active_elsewhere: Names that the PEFT model calls active and does not have; empty where it calls none active
            while its layers apply one; None where the two agree.
    """

    base: BaseFacts
    configs: tuple[ConfigFacts, ...]
    layers: tuple[LayerState, ...]
    saved: tuple[SavedModule, ...]
    rows: tuple[TrainedRows, ...]
    trainable_base: tuple[TrainableBase, ...]
    nonfinite_base: tuple[str, ...]
    inference_base: tuple[str, ...]
    adapters: tuple[str, ...]
    active: tuple[str, ...]
    nested: int
    training: bool
    base_dropouts: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    stored_parameters: int
    duplicates: tuple[tuple[str, str], ...]
    reentrant_without_inputs: bool
    wrappers: Wrappers = field(default_factory=Wrappers)
    colliding: tuple[CollidingName, ...] = ()
    trains_xlora: bool = False
    initial_rows: tuple[InitialRows, ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    combined: tuple[CombinedAdapter, ...] = ()
    zero_base: tuple[str, ...] = ()
    active_elsewhere: tuple[str, ...] | None = None

    @property
    def active_layers(self) -> tuple[LayerState, ...]:
        """The adapters that are meant to take part in the forward pass."""
        return tuple(layer for layer in self.layers if layer.adapter in self.active)

    @property
    def kept(self) -> tuple[SavedModule | TrainedRows, ...]:
        """What adapters train and save besides their low-rank factors."""
        return (*self.saved, *self.rows)

    @property
    def training_adapters(self) -> tuple[str, ...]:
        """Names of the adapters that have a trainable factor anywhere."""
        return tuple(dict.fromkeys(layer.adapter for layer in self.layers if layer.trainable))

    @property
    def disabled(self) -> bool:
        """Whether the adapters are switched off in every layer."""
        return bool(self.layers) and all(layer.disabled for layer in self.layers)

    @property
    def wiped(self) -> tuple[tuple[str, str], ...]:
        """Adapters of which everything is zero, each with one that is not and whose name is a part of theirs."""
        empty = [name for name in self.adapters if all(p.a.zero and p.b.zero for p in self.of(name))]
        return tuple(
            (name, other)
            for name in empty
            for other in self.adapters
            if other != name and other in name and other not in empty
        )

    def of(self, adapter: str) -> tuple[LayerState, ...]:
        """One adapter on all its modules."""
        return tuple(layer for layer in self.layers if layer.adapter == adapter)

    def config_of(self, adapter: str) -> ConfigFacts | None:
        """The configuration of one adapter, if the model still knows it."""
        return next((config for config in self.configs if config.adapter == adapter), None)


USUAL_INITS = ("true", "gaussian")
"""Values of ``init_lora_weights`` under which ``alpha / r`` says how far a step reaches: ``lora_A`` is random noise of
one scale and ``lora_B`` zero."""


def unusual_inits(model: ModelFacts) -> dict[str, str]:
    """Active adapters of another initialisation, which has scales of its own, with its name."""
    inits = {c.adapter: str(c.settings.init_lora_weights) for c in model.configs if c.adapter in model.active}
    return {adapter: init for adapter, init in inits.items() if init.lower() not in USUAL_INITS}
