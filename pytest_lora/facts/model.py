"""Facts about a live model that carries LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.config import ConfigFacts, LayerFacts


@dataclass(frozen=True, slots=True)
class Factor:
    """One of the two low-rank factors of an adapter on one module.

    Attributes:
        name: ``"lora_A"``, ``"lora_B"``, ``"lora_embedding_A"`` or ``"lora_embedding_B"``.
        shape: As stored.
        dtype: ``"float32"``, ``"bfloat16"``, ...
        device: ``"cpu"``, ``"cuda:0"``, ``"meta"``.
        trainable: Whether it requires gradients.
        zero: Whether every number is zero; None on the meta device.
        finite: Whether every number is finite; None on the meta device.
        frozen_by_design: Whether the LoRA variant itself trains without this factor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    trainable: bool
    zero: bool | None
    finite: bool | None
    frozen_by_design: bool = False


@dataclass(frozen=True, slots=True)
class LayerState(LayerFacts):
    """An adapter on one module of a live model, as it stands.

    Attributes:
        a: The factor that starts at random: ``lora_A``; on an embedding ``lora_embedding_B``.
        b: The factor that starts at zero under the default initialisation: ``lora_B``; on an
            embedding ``lora_embedding_A``.
        expected_a: First two sizes that the rank and the base weight ask of ``a``.
        expected_b: The same for ``b``.
        base_device: Device of the base weight.
        active: Whether the adapter takes part in the forward pass here.
        disabled: Whether all adapters are switched off here.
        merged: Whether the adapter is merged into the base weight here.
        dropout_live: Whether a LoRA dropout above zero is in training mode.
    """

    a: Factor
    b: Factor
    expected_a: tuple[int, int]
    expected_b: tuple[int, int]
    base_device: str
    active: bool
    disabled: bool
    merged: bool
    dropout_live: bool

    @property
    def trainable(self) -> bool:
        """Whether any factor requires gradients."""
        return self.a.trainable or self.b.trainable


@dataclass(frozen=True, slots=True)
class SavedModule:
    """A full copy of a base module that one adapter trains (``modules_to_save``).

    Attributes:
        module: Name of the module in the base.
        adapter: Name of the adapter that owns the copy.
        trainable: Whether all of the copy requires gradients.
        finite: Whether every number is finite; None on the meta device.
        same_shape: Whether the copy has the shapes of the original.
        active: Whether the copy takes part in the forward pass.
        tied: Other modules that shared the original's weight and do not share the copy's.
    """

    module: str
    adapter: str
    trainable: bool
    finite: bool | None
    same_shape: bool
    active: bool
    tied: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrainableBase:
    """A parameter of the base that requires gradients though no adapter owns it."""

    name: str
    parameters: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model with LoRA adapters.

    Attributes:
        base: The base model.
        configs: The configuration of each adapter, as far as the model still knows it.
        layers: Every adapter on every module.
        saved: Full copies that adapters train.
        trainable_base: Base parameters that require gradients.
        nonfinite_base: Base parameters that hold NaN or infinity.
        adapters: Names of all LoRA adapters.
        active: Names of the active ones.
        nested: How many PEFT models are wrapped inside each other (1 is healthy).
        training: Whether the model as a whole is in training mode.
        trainable_parameters: Logical numbers that require gradients.
        total_parameters: Logical numbers in the model, adapters included.
        stored_parameters: The same, with packed 4-bit weights counted as they are stored.
        reentrant_without_inputs: Reentrant gradient checkpointing is on and nothing makes its input require
            gradients, so that no gradient reaches an adapter inside.
    """

    base: BaseFacts
    configs: tuple[ConfigFacts, ...]
    layers: tuple[LayerState, ...]
    saved: tuple[SavedModule, ...]
    trainable_base: tuple[TrainableBase, ...]
    nonfinite_base: tuple[str, ...]
    adapters: tuple[str, ...]
    active: tuple[str, ...]
    nested: int
    training: bool
    trainable_parameters: int
    total_parameters: int
    stored_parameters: int
    reentrant_without_inputs: bool

    @property
    def active_layers(self) -> tuple[LayerState, ...]:
        """The adapters that are meant to take part in the forward pass."""
        return tuple(layer for layer in self.layers if layer.adapter in self.active)
