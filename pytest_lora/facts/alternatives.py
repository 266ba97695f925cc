"""What else could be done where a training step does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Seen = Literal["same batch", "same batch, rounded", "fewer weights", "shorter texts"]
"""What training sees of a change, the least first: nothing but micro-batches and what is computed twice; numbers that
are kept in fewer bits; an adapter with fewer parameters; other data."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a change, or several at once, would make of the peak, and what it costs.

    Attributes:
        changes: The changes, each as one would write it.
        peak_allocated: Bytes.
        flops: Operations of one optimizer step, for as many sequences as now.
        learner: What training sees of it.
        smaller_rank: Whether it does nothing but lower the rank.
    """

    changes: tuple[str, ...]
    peak_allocated: int
    flops: int
    learner: Seen = "same batch"
    smaller_rank: bool = False

    @property
    def change(self) -> str:
        """All of it in one line."""
        return " with ".join(self.changes)
