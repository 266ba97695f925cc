"""Facts about parts of a live model: one adapter on one module, what keeps gradients from it, and what wraps the model
to train it in several processes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_lora.facts.config import LayerFacts

if TYPE_CHECKING:
    from pytest_lora.facts.training import TrainingFacts


@dataclass(frozen=True, slots=True)
class Factor:
    """One of the two low-rank factors of an adapter on one module.

    Attributes:
        name: As PEFT calls it: ``"lora_A"``, ``"lora_B"``, ``"lora_embedding_A"``, ``"lora_magnitude_vector"``, ...
        shape: As stored.
        dtype: ``"float32"``, ``"bfloat16"``, ...
        device: ``"cpu"``, ``"cuda:0"``, ``"meta"``.
        trainable: Whether it requires gradients.
        zero: Whether every number is zero; None on the meta device.
        finite: Whether every number is finite; None on the meta device.
        largest: The largest absolute number, where all are finite; None on the meta device.
        frozen_by_design: Whether the LoRA variant itself trains without this factor.
        is_inference: Whether it was made under ``torch.inference_mode()``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    trainable: bool
    zero: bool | None
    finite: bool | None
    largest: float | None = None
    frozen_by_design: bool = False
    is_inference: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether it holds whole numbers, which no gradient can train."""
        return "int" in self.dtype


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
        further: What a variant trains beside the two factors: the magnitude of DoRA, the diagonal of KaSA, the left
            singular vectors of AdaLoRA, whose ``b`` are the singular values (``lora_E``).
        own_code: What is not PEFT's about the layer: ``"class my.Linear"``, ``"forward"``; empty for a layer of PEFT.
        swappable: Whether it was prepared for hot-swapping, so that its scaling is a tensor.
        empty_ranks: Ranks at which both factors are zero though others hold something.
        idle_ranks: Ranks at which ``b`` alone still is zero.
        zero_outputs: Rows of ``b`` that still are zero, where they are one block at an end.
        normless: Rows in which the magnitude of DoRA, ``b`` and the base weight all are zero.
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
    further: tuple[Factor, ...]
    own_code: str = ""
    swappable: bool = False
    empty_ranks: int = 0
    idle_ranks: int = 0
    zero_outputs: int = 0
    normless: int = 0

    @property
    def parts(self) -> tuple[Factor, ...]:
        """The tensors of the adapter here."""
        return (self.a, self.b, *self.further)

    @property
    def prunes_ranks(self) -> bool:
        """Whether AdaLoRA takes ranks away from this module while it trains."""
        return self.b.name == "lora_E"

    @property
    def trainable(self) -> bool:
        """Whether any factor requires gradients."""
        return self.a.trainable or self.b.trainable

    @property
    def is_scaled_as_configured(self) -> bool:
        """Whether the scaling in effect is what rank and alpha give."""
        return math.isclose(self.scaling, self.configured_scaling, rel_tol=1e-5)

    @property
    def is_swapped(self) -> bool:
        """Whether factors of another configuration were swapped in, as scaling or padded ranks show."""
        return not self.is_scaled_as_configured and (self.swappable or self.empty_ranks > 0)

    @property
    def can_learn(self) -> bool:
        """Whether a gradient can reach a trainable factor: that of one factor is a product with the other."""
        return (self.b.trainable and self.a.zero is not True) or (
            self.a.trainable and self.b.zero is not True
        )

    @property
    def in_expert(self) -> bool:
        """Whether the module belongs to an expert of a sparse mixture, which some data never reaches."""
        return any("expert" in part for part in self.module.split("."))

    @property
    def changes_output(self) -> bool | None:
        """Whether the product of the factors can be other than zero; None where there are no values."""
        if self.a.zero is None or self.b.zero is None:
            return None
        return not (self.a.zero or self.b.zero)


def why_silent(facts: TrainingFacts, layer: LayerState) -> str | None:
    """What keeps gradients from one adapter on one module, where that can be told."""
    if layer.disabled:
        return "adapters are disabled (disable_adapters or disable_adapter_layers)"
    if layer.merged:
        return "the adapter is merged into the base weights"
    if not layer.trainable:
        return "its tensors are frozen (requires_grad=False)"
    embeds = "inputs_embeds" in facts.inputs
    if layer.module in facts.untouched:
        outside = "the module is outside the forward pass"
        past = embeds and layer.module == facts.model.base.input_embeddings
        return f"{outside}: inputs_embeds come from outside, past the embeddings" if past else outside
    if layer.module in facts.cut:
        why = "reentrant gradient checkpointing runs it without a graph: no input of its block requires gradients"
        return (
            f"{why}, as inputs_embeds come from outside, past the hook on the embeddings" if embeds else why
        )
    if layer.module in facts.without_graph and facts.has_graph:
        return "it runs under torch.no_grad()"
    if facts.model.reentrant_without_inputs:
        return "reentrant gradient checkpointing without input gradients cuts the graph"
    if layer.scaling == 0:
        return f"lora_alpha={layer.alpha:g}: the scaling is 0"
    if layer.dropout >= 1:
        return "lora_dropout=1 drops every input"
    if layer.b.zero and not layer.b.trainable:
        return f"{layer.b.name} is zero and frozen"
    if layer.a.zero and layer.b.zero:
        return f"{layer.a.name} and {layer.b.name} are both zero"
    return None


@dataclass(frozen=True, slots=True)
class LateAdapter:
    """An adapter that was put in after a wrapper was made, which does not know its parameters.

    Attributes:
        wrapper: ``"DistributedDataParallel"``, ``"FSDP"`` or ``"torch.compile"``.
        parameters: Names of what it does not know.
    """

    wrapper: str
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reducer:
    """A ``DistributedDataParallel``.

    Attributes:
        finds_unused: ``find_unused_parameters``: whether each step looks for weights that took no part in it.
        static_graph: Whether it was told that every step uses the same weights, whichever these are.
        unreduced: Names of tensors that it was given frozen and that require gradients now.
        idle: Names of tensors whose gradients it waits for and that get none: frozen since, or of an adapter outside
            the forward pass.
        reentrant: Whether gradient checkpointing inside of it is reentrant.
        optional: Whether modules inside may take no part in a step that others take part in: experts, or towers for
            other inputs than text.
    """

    finds_unused: bool
    static_graph: bool
    unreduced: tuple[str, ...]
    idle: tuple[str, ...]
    reentrant: bool
    optional: bool


@dataclass(frozen=True, slots=True)
class Shard:
    """Parameters that FSDP gathers together.

    Attributes:
        version: 1 (``FullyShardedDataParallel``) or 2 (``fully_shard``).
        name: Name of the module that they were wrapped with; empty for the model as a whole.
        ranks: Processes that they are divided among.
        gathered_as: Dtype of the policy of mixed precision in which they are gathered; empty where it sets none.
        packed_as: Dtypes, floating ones, in which 4-bit weights among them are stored.
        trained_dtypes: Dtypes of those that require gradients.
        trained: Numbers that require gradients.
        frozen: Numbers that do not.
    """

    version: int
    name: str
    ranks: int
    gathered_as: str
    packed_as: tuple[str, ...]
    trained_dtypes: tuple[str, ...]
    trained: int
    frozen: int


@dataclass(frozen=True, slots=True)
class Wrappers:
    """What wraps a model, or parts of it.

    Attributes:
        late: Adapters that were put in after a wrapper was made.
        reducers: Wrappers of DDP.
        shards: Groups of parameters of FSDP.
        apart: Modules adapted by DoRA whose base weight FSDP gathers for the base layer alone.
        unseen: Tensors of adapters whose values this process has not whole.
    """

    late: tuple[LateAdapter, ...] = ()
    reducers: tuple[Reducer, ...] = ()
    shards: tuple[Shard, ...] = ()
    apart: tuple[str, ...] = ()
    unseen: int = 0

    @property
    def ranks(self) -> int:
        """The most processes that a parameter is divided among; 1 where none is."""
        return max((shard.ranks for shard in self.shards), default=1)


_BLOCK = re.compile(r"(?P<stack>.*?)\.?\b(?P<number>\d+)\.(?P<rest>.+)")


def at_the_end_of_a_stream(idle: Collection[str], working: Collection[str]) -> frozenset[str]:
    """Modules that make what the last block of their stack hands to no one.

    Where two streams attend to each other and one of them ends (the text of Stable Diffusion 3), its query in the last
    block has no use, while other modules of that block and the same module of the blocks before work.

    Args:
        idle: Names of adapted modules that get no gradient.
        working: Names of those that get one.
    """
    places = {
        name: (found["stack"], int(found["number"]), found["rest"])
        for name in (*idle, *working)
        if (found := _BLOCK.fullmatch(name))
    }
    last: dict[str, int] = {}
    for stack, number, _ in places.values():
        last[stack] = max(number, last.get(stack, 0))
    busy = {places[name] for name in working if name in places}
    blocks = {(stack, number) for stack, number, _ in busy}
    return frozenset(
        name
        for name in idle
        if (place := places.get(name))
        and place[1] == last[place[0]]
        and place[:2] in blocks
        and any((place[0], number, place[2]) in busy for number in range(place[1]))
    )
