"""Facts about what wraps a live model to train it in several processes."""

from __future__ import annotations

from dataclasses import dataclass


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
