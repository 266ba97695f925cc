"""What trains an adapter, and what some real steps of it show, as facts; here whether they lower the loss.

Everything is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.curve_shape import LossDrop
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.inspection.placement import moved, place
from pytest_lora.inspection.state import cuda_in_use
from pytest_lora.inspection.training.batches import LossFn, Plan, first_rows, loss_of, take_batches
from pytest_lora.inspection.training.optimizer import optimizer_facts
from pytest_lora.inspection.training.probe import prepared, training_facts
from pytest_lora.inspection.training.rows import row_facts
from pytest_lora.inspection.training.watch import FirstSteps

__all__ = [
    "FirstSteps",
    "LossFn",
    "Plan",
    "first_rows",
    "loss_drop",
    "optimizer_facts",
    "place",
    "row_facts",
    "training_facts",
]


def loss_drop(
    model: nn.Module, batches: Any, plan: Plan, by: float, device: torch.device | None
) -> tuple[TrainingFacts, LossDrop]:
    """Train on some batches, and compare their mean loss, dropout off, before and after.

    Args:
        model: The model.
        batches: One batch or an iterable of batches; of a list no more than ``plan.steps`` are used.
        plan: How to train; a ``rate`` of None chooses one that suits the adapters.
        by: Relative drop that is asked for.
        device: Where model and batches are moved for the time being, or None to leave them where they are.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or ``batches`` has another form.
        ValueError: There is no batch, the model gives no loss for one, or it could not be put back.
        NotRestoredError: Something changed that could not be put back.
    """
    with prepared(model, batches, plan, device) as (probe, keeper):
        taken = take_batches(batches, plan.steps, plan.loss_fn)[: plan.steps]
        keeper.keep(taken)
        if device is not None:
            taken = tuple(moved(batch, device) for batch in taken)
        probe.take(taken)
        mean_loss = _evaluation(model, taken, plan.loss_fn)
        before = mean_loss() if probe.runnable else float("nan")
        probe.run()
        after = mean_loss() if probe.runnable else float("nan")
        facts = probe.facts(len(taken))
    return facts, LossDrop(
        before=before,
        after=after,
        curve=tuple(step.loss for step in facts.steps),
        lr=None if plan.optimizer is not None else probe.rate,
        by=by,
        adapter_learned=facts.adapter_learned,
    )


def _evaluation(model: nn.Module, batches: tuple[Any, ...], loss_fn: LossFn | None) -> Callable[[], float]:
    """The mean loss of fixed batches, in evaluation mode and from the same random state at every call."""
    devices = range(torch.cuda.device_count()) if cuda_in_use() else range(0)
    seed = torch.initial_seed() % 2**63

    def mean_loss() -> float:
        modes = [(module, module.training) for module in model.modules()]
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            for module, _ in modes:
                module.training = False
            try:
                return sum(float(loss_of(model, batch, loss_fn)) for batch in batches) / len(batches)
            finally:
                for module, training in modes:
                    module.training = training

    return mean_loss
