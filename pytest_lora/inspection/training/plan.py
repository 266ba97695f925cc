"""How to train, as the user gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pytest_lora.inspection.training.batches import LossFn


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train, as the user gave it.

    Attributes:
        steps: Optimizer steps; 0 looks at labels and modes only.
        rate: Learning rate of the AdamW that is made where ``optimizer`` is None; None chooses one.
        optimizer: The user's optimizer.
        scheduler: Stepped once after each step.
        max_grad_norm: Where gradients are clipped.
        scaler: A GradScaler.
        history: Losses so far.
        base_snapshot: Tensors of the base before training, by name.
        loss_fn: Makes the loss; by default the model does.
        ranks: Measure the rank of what the steps did to each adapted weight.
        tell_failures: Note what the model or the optimizer raises, where its cause is known, instead of passing it on.
    """

    steps: int
    rate: float | None
    optimizer: Any = None
    scheduler: Any = None
    max_grad_norm: float | None = None
    scaler: Any = None
    history: Sequence[float] = ()
    base_snapshot: Mapping[str, Tensor] | None = None
    loss_fn: LossFn | None = None
    ranks: bool = False
    tell_failures: bool = False

    @property
    def kept(self) -> tuple[object, ...]:
        """What has a state of its own."""
        return self.optimizer, self.scheduler, self.scaler
