"""Facts about the steps of a training: what each did to tensors, and what kept one from being taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pytest_lora.facts.optimizer import Part


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A parameter that may train, over some real steps.

    Attributes:
        name: Name in the model.
        module: Module of the base that it belongs to.
        adapter: Adapter that owns it; empty for the base.
        part: What it is.
        dtype: ``"float32"``, ``"float16"``, ...
        numbers: Size.
        trainable: Whether it requires gradients.
        held: Whether the optimizer holds it.
        finite: Whether every number was finite before the first step.
        scale: Root mean square before the first step.
        gradients: L2 norm of its gradient at each step, before clipping; None where none arrived.
        moves: Root mean square of its change at each step.
        stayed: Share of its numbers that the last step left as they were, in bfloat16 and float16; else 0.
        held_rows: Rows of tokens of the last batch whose gradient a hook of the user's own set to zero.
        token_rows: How many rows of tokens it was asked of; 0 where there is no such hook.
        group: Place of the optimizer's group that holds it, or None.
    """

    name: str
    module: str
    adapter: str
    part: Part
    dtype: str
    numbers: int
    trainable: bool
    held: bool
    finite: bool
    scale: float
    gradients: tuple[float | None, ...]
    moves: tuple[float, ...]
    stayed: float
    held_rows: int = 0
    token_rows: int = 0
    group: int | None = None

    @property
    def reached(self) -> bool:
        """Whether a gradient other than zero arrived at any step."""
        return any(g is not None and g != 0 for g in self.gradients)

    @property
    def moved(self) -> bool:
        """Whether any step changed it."""
        return any(m != 0 for m in self.moves)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One real optimizer step.

    Attributes:
        batch: Index of the batch.
        loss: The loss before the step.
        has_graph: Whether the loss depends on anything that requires gradients.
        rates: Learning rate of each group.
        gradient_norm: L2 norm of all gradients together, before clipping; None where there are none.
    """

    batch: int
    loss: float
    has_graph: bool
    rates: tuple[float, ...]
    gradient_norm: float | None

    @property
    def finite(self) -> bool:
        """Whether the loss was finite, and the gradients, if there were any."""
        return math.isfinite(self.loss) and (self.gradient_norm is None or math.isfinite(self.gradient_norm))


@dataclass(frozen=True, slots=True)
class ShiftFacts:
    """The first loss of a causal model beside those that its logits give.

    Attributes:
        loss: The loss.
        in_place: Mean cross-entropy of the logits and the labels at the same position.
        ahead: The same with the labels one position later, which a causal model is to predict.
    """

    loss: float
    in_place: float
    ahead: float

    @property
    def forgotten(self) -> bool:
        """Whether the loss is made of labels at the position of their logits, and of nothing else."""
        return _close(self.loss, self.in_place, SAME) and not _close(self.loss, self.ahead, APART)


SAME, APART = 1e-5, 1e-4
"""Relative: what the order of a sum in float32 does to a mean, with room, and from where on two losses are two. A new
model gives about ln(vocabulary) with a shift and without one, apart by a few parts in a thousand."""


@dataclass(frozen=True, slots=True)
class TaughtFacts:
    """Which token the first loss asks for: the gradient of a cross-entropy at the logits is lowest at the target.

    Attributes:
        positions: Positions at which the gradient is below zero anywhere, so that something is asked for.
        read: Share of them at which that is the token which the model has just read.
        following: Share of them at which it is the next one, which a language model is to predict.
        later: Share of them at which it is the one after that.
    """

    positions: int
    read: float
    following: float
    later: float

    @property
    def copies(self) -> bool:
        """Whether the loss asks for what was just read."""
        return self._asks_for(self.read)

    @property
    def skips(self) -> bool:
        """Whether the loss asks for the token after the next one."""
        return self._asks_for(self.later)

    def _asks_for(self, share: float) -> bool:
        return self.positions >= ENOUGH and share >= ALIKE and self.following < UNLIKE


ENOUGH, ALIKE, UNLIKE = 8, 0.9, 0.5
"""Positions that a verdict needs, and shares: a text of one repeated token is alike in every way."""


def _close(left: float, right: float, within: float) -> bool:
    return abs(left - right) <= within * max(abs(left), abs(right))


@dataclass(frozen=True, slots=True)
class EmptyRows:
    """Tokens of the batches whose rows are all zero.

    Attributes:
        module: The embedding or the head.
        tokens: The tokens, in order.
    """

    module: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PaddingFacts:
    """What padding has to do with a loss, by its gradients at the embedded tokens.

    Attributes:
        batch: Index of the batch.
        rows: Rows with padding that ``attention_mask`` hides.
        share: Norm of the gradient at padded positions over that at all of them.
    """

    batch: int
    rows: int
    share: float


@dataclass(frozen=True, slots=True)
class SpreadFacts:
    """Two tensors that a loss compares, of which each is spread over the other.

    Attributes:
        target: Sizes of what is to be predicted.
        given: Sizes of what is predicted.
    """

    target: tuple[int, ...]
    given: tuple[int, ...]


Phase = Literal["forward pass", "backward pass", "optimizer step"]

FailureKind = Literal[
    "text too long",
    "inputs of other lengths",
    "state of another shape",
    "label dtype",
    "label shape",
    "no head",
    "ids are not whole",
    "no padding token",
    "weight dtypes",
    "index",
    "devices",
    "inference tensors",
    "unknown input",
    "input of the wrapper",
    "graph used twice",
    "changed in place",
    "placeholders",
    "token types",
]


@dataclass(frozen=True, slots=True)
class Failure:
    """A step that could not be taken, for a reason that is known.

    Attributes:
        step: Number of the step, from 1 on.
        batch: Index of the batch.
        phase: What raised.
        kind: What is wrong, by the words of the exception.
        error: Class name of the exception.
        message: The first line of what it said, or the one that tells.
        length: Tokens in a row of the batch, where it has rows of tokens, else None.
        positions: Positions that the model was made for, where its configuration says so, else None.
        odd: Inputs that ought to have a value for each token and have more or fewer, with their shapes.
    """

    step: int
    batch: int
    phase: Phase
    kind: FailureKind
    error: str
    message: str
    length: int | None
    positions: int | None
    odd: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BaseChange:
    """A weight or buffer of the base that is not what it was.

    Attributes:
        name: Name in the base.
        module: The module it is in.
        kind: ``"weight"`` or ``"buffer"``.
        since: ``"snapshot"`` or ``"probe"``: against what it was compared.
        relative: Norm of the change over the norm before.
        precision: Machine epsilon of its dtype.
        trainable: Whether it requires gradients.
        adapted: Whether an adapter is on its module.
        batch_norm: Whether its module is a batch normalisation.
    """

    name: str
    module: str
    kind: Literal["weight", "buffer"]
    since: Literal["snapshot", "probe"]
    relative: float
    precision: float
    trainable: bool
    adapted: bool
    batch_norm: bool


@dataclass(frozen=True, slots=True)
class UpdateFacts:
    """What the steps did to one adapted weight through one adapter.

    The update is ``scaling * B @ A`` after the steps less what it was before them, plus what the base weight itself
    moved by. The magnitude of DoRA is left out: it rescales whole rows and is not low-rank by design
    (arXiv:2402.09353).

    Attributes:
        module: Module of the base.
        adapter: The adapter.
        rank: Numerical rank of the update, or None where it was not measured.
        allowed: The rank that it may have: r where ``B @ A`` was zero before, and 2 r else, as
            ``B A - B' A' = [B B'] [A; -A']``.
        from_zero: Whether ``B @ A`` was zero before.
        norm: Its Frobenius norm; NaN where it is unknown.
        relative: That over the norm of the base weight, or None where the latter is unknown or zero.
        base_moved: Whether the stored base weight is not what it was.
        unknown: Why the update could not be measured; empty where it was.
    """

    module: str
    adapter: str
    rank: int | None
    allowed: int
    from_zero: bool
    norm: float
    relative: float | None
    base_moved: bool
    unknown: str
