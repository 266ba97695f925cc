"""A plain training loop, for those who have batches and no loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_lora.sweep.plan import TrialPlan


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
