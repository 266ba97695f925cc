"""What one trial is about, as the training function of the user sees it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_lora.sweep.rows import Failure, TrialKey, TrialRow


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """One trial: a rank, a seed, and how much to train.

    Attributes:
        rank: ``r`` of the adapter.
        alpha: ``lora_alpha`` of the adapter.
        seed: Set before the base and again before the adapter is made.
        fraction: Share of the training data to use, above 0 and at most 1.
        epochs: Passes over that share.
        learning_rate: Peak learning rate to train with; None in a sweep over ranks alone, where ``train`` has its own.
        budget: Share of the full training that ``fraction`` is cut to: below 1 in the early rounds of a sweep that
            halves.
    """

    rank: int
    alpha: float
    seed: int
    fraction: float = 1.0
    epochs: int = 1
    learning_rate: float | None = None
    budget: float = 1.0
    drawn: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def key(self) -> TrialKey:
        """Which trial of a sweep this is."""
        return self.rank, self.learning_rate, self.seed, self.budget

    def row(self, failure: Failure | None = None) -> TrialRow:
        """The row of this trial, in which nothing is measured yet."""
        return TrialRow(
            self.rank,
            self.alpha,
            self.seed,
            learning_rate=self.learning_rate,
            budget=self.budget,
            failure=failure,
        )

    def share(self, items: Sequence[Any]) -> list[Any]:
        """The share of the data for this trial: ``ceil(fraction * len(items))`` of them, drawn by the seed.

        Trials with one seed get the same items in the same order, whatever their rank, so that ranks are
        compared in pairs; no global random state is used. What was drawn is noted in the trial's row.

        Args:
            items: Anything with a length and an index, such as a list of batches or a ``Dataset``.

        Raises:
            TypeError: ``items`` has no length or no index.
            ValueError: There are none.
        """
        if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
            raise TypeError(
                f"items must have a length and an index, as a list has, not {type(items).__name__}"
            )
        if not len(items):
            raise ValueError("items must not be empty: there is nothing to train on")
        # The product of 0.1 and 30 is a little above 3, which is not to count as a fourth item.
        count = max(1, math.ceil(self.fraction * len(items) - 1e-9))
        chosen = random.Random(self.seed).sample(range(len(items)), count)
        self.drawn.append(f"{count} of {len(items)}")
        return [items[index] for index in chosen]
