"""Rank sweep: what one trial is about, as the training function sees it, and a plain training loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_lora.sweep.rows import Failure, TrialKey, TrialRow

if TYPE_CHECKING:
    from torch import Tensor, nn


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


class TrainOn:
    """Trains with AdamW on batches, the learning rate falling to zero: a ``train`` for ``rank_sweep``.

    Args:
        batches: A list of batches, each a mapping for ``model(**batch)``, or whatever ``loss_fn`` takes.
        lr: Peak learning rate, where the sweep has none. The default 2e-4 is what QLoRA (arXiv:2305.14314) uses for
            models up to 13B; tiny models want more.
        loss_fn: Called with the model and a batch, gives a scalar loss; by default the loss that the model returns.

    Raises:
        TypeError: ``batches`` is no sequence.
        ValueError: It is empty, or ``lr`` is not above 0.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        *,
        lr: float = 2e-4,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        if isinstance(batches, (str, bytes, Mapping)) or not hasattr(batches, "__getitem__"):
            raise TypeError(f"batches must be a list of batches, not {type(batches).__name__}")
        if not len(batches):
            raise ValueError("batches must not be empty")
        if not lr > 0:
            raise ValueError(f"lr must be above 0, not {lr!r}")
        self.batches, self.lr, self.loss_fn = batches, lr, loss_fn

    def __call__(self, model: nn.Module, plan: TrialPlan) -> list[float]:
        """Train; returns the loss of every step."""
        import torch

        batches = plan.share(self.batches) * plan.epochs
        device = next(model.parameters()).device
        rate = self.lr if plan.learning_rate is None else plan.learning_rate
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
        losses = []
        for batch in batches:
            loss = self._loss(model, _on(device, batch))
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.loss_fn is not None:
            return self.loss_fn(model, batch)
        loss: Tensor = model(**batch).loss
        return loss


def _on(device: Any, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
