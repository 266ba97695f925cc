"""Facts about how far the loss of fixed batches went down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytest_lora.facts.curve_shape import FITS


@dataclass(frozen=True, slots=True)
class LossDrop:
    """How far the loss of fixed batches went down.

    Attributes:
        before: Mean loss of the batches before training, dropout off, in the unit of the loss (nats per token for
            a language model).
        after: The same after it.
        curve: Loss of each step, dropout as it was.
        lr: Learning rate of the optimizer that was made; None where the user's own ran.
        by: Relative drop that was asked for.
        adapter_learned: Whether a gradient reached any low-rank factor and a step moved it.
    """

    before: float
    after: float
    curve: tuple[float, ...]
    lr: float | None
    by: float
    adapter_learned: bool

    @property
    def drop(self) -> float:
        """Relative drop; NaN where a loss is not finite or there was none."""
        return (self.before - self.after) / self.before if self.before else math.nan

    @property
    def fits_already(self) -> bool:
        """Whether there was nothing left to learn, before and after."""
        return abs(self.before) < FITS and abs(self.after) < FITS

    @property
    def healthy(self) -> bool:
        """Whether the adapter learned, and the loss fell far enough or had nothing left to fall."""
        return self.adapter_learned and (self.drop >= self.by or self.fits_already)
