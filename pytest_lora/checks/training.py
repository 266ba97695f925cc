"""Some real optimizer steps, put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import (
    require_at_least,
    require_expect,
    require_history,
    require_norm,
    require_snapshot,
    require_steps,
    require_trainers,
)
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.drawing import (
    drop_curve,
    model_maps,
)
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from pytest_lora.facts.training import LossDrop
    from pytest_lora.inspection.training import LossFn


PROBE_STEPS = 3
"""Steps of ``check_training``. The first moves ``lora_B``, the second gives ``lora_A`` its first gradient; one more, as
a warm-up may begin at a learning rate of zero."""


PROBE_RATE = 1e-3
"""Learning rate of the AdamW that ``check_training`` makes where it is given no optimizer."""


def check_training(
    model: nn.Module,
    batches: Mapping[str, Any] | Iterable[Any],
    *,
    optimizer: Optimizer | None = None,
    steps: int = PROBE_STEPS,
    scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    scaler: GradScaler | None = None,
    history: Sequence[float] | None = None,
    base_snapshot: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    expect: Expect | None = None,
) -> Report:
    """Take some real optimizer steps, judge what was seen, and put everything back bit for bit.

    Weights, buffers, gradients, training flags, hooks, random states, optimizer, scheduler and scaler are afterwards
    what they were, also when something raises half-way. What the model or the optimizer raises is a finding where its
    cause is known by its words; anything else, and what ``loss_fn`` raises, goes on. Where ``expect.purpose`` is not
    ``"train"``, no step is taken: labels and modes are looked at only.

    Args:
        model: Anything with PEFT LoRA layers; see ``check_model``. It is run in the mode that it is in.
        batches: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches, used in order and over
            again. At most ``steps`` are taken from an iterator; of a list, up to 64 are looked at.
        optimizer: The optimizer of the real run. By default an AdamW over everything that requires gradients.
        steps: Optimizer steps to take, at least 1. The default is 3.
        scheduler: The learning-rate schedule of the real run, stepped once an optimizer step.
        max_grad_norm: The norm at which the real run clips gradients.
        scaler: The GradScaler of the real run.
        history: Losses of the run so far, one an optimizer step or log line.
        base_snapshot: Weights and buffers of the base before training, by their name in the base or in ``model``.
        loss_fn: Called with the model and a batch, gives a scalar loss; by default the loss that the model returns.
        expect: What is meant, where only the user can know it.

    Returns:
        A report with the rules of the stage *training* (codes 3xx).

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: An argument is out of its range, there is no batch, or the model gives no loss for one.
    """
    from pytest_lora.facts.history import history_facts
    from pytest_lora.inspection.training import Plan, training_facts

    expect = require_expect(expect)
    require_steps(steps)
    require_trainers(optimizer, scheduler, scaler, loss_fn)
    require_norm(max_grad_norm)
    plan = Plan(
        steps=steps if expect.purpose == "train" else 0,
        rate=PROBE_RATE,
        optimizer=optimizer,
        scheduler=scheduler,
        max_grad_norm=max_grad_norm,
        scaler=scaler,
        history=require_history(history),
        base_snapshot=require_snapshot(base_snapshot),
        loss_fn=loss_fn,
        tell_failures=True,
    )
    facts = training_facts(model, batches, plan)
    judged: list[object] = [facts, facts.optimizer]
    if plan.history:
        judged.append(history_facts(plan.history, zero_has_gradient=facts.zero_has_gradient))
    subject = f"training of {type(model).__name__} of {facts.model.base.title}"
    return Report(subject, tuple(judge(judged, expect)), model_maps(facts.model, facts))


OWN_DROP = 0.01
"""Relative drop asked of the learning rate that ``check_loss_decreases`` chooses. Healthy set-ups fall by 2 % at least,
broken ones not at all, as the same batches are compared without dropout (``benchmarks/loss_decreases.py``)."""


GIVEN_DROP = 0.0005
"""Relative drop asked of a learning rate or optimizer that the user chose, which may be made for thousands of steps."""


def check_loss_decreases(
    model: nn.Module,
    batches: Mapping[str, Any] | Iterable[Any],
    *,
    steps: int = 20,
    by: float | None = None,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    loss_fn: LossFn | None = None,
    device: str | torch.device | None = None,
) -> Report:
    """Train for some steps, and judge whether the adapter lowers the loss; see ``assert_loss_decreases``.

    Returns:
        A report that is empty where the loss fell far enough; else what was measured and the likely reasons.
    """
    return measure_loss_drop(
        model, batches, steps=steps, by=by, optimizer=optimizer, lr=lr, loss_fn=loss_fn, device=device
    )[0]


def measure_loss_drop(
    model: nn.Module,
    batches: Any,
    *,
    steps: int,
    by: float | None,
    optimizer: Optimizer | None,
    lr: float | None,
    loss_fn: LossFn | None,
    device: str | torch.device | None,
) -> tuple[Report, LossDrop]:
    """What ``check_loss_decreases`` reports, with the measurement."""
    from pytest_lora.inspection.training import Plan, loss_drop, place

    require_steps(steps)
    require_trainers(optimizer, None, None, loss_fn)
    require_at_least("lr", lr, least=0.0)
    require_at_least("by", by, least=0.0)
    if lr is not None and optimizer is not None:
        raise ValueError("lr is for the optimizer that is made here; set it in the optimizer that you give")
    if by is None:
        by = OWN_DROP if optimizer is None and lr is None else GIVEN_DROP
    plan = Plan(steps=steps, rate=lr, optimizer=optimizer, loss_fn=loss_fn)
    facts, drop = loss_drop(model, batches, plan, by, place(model, device, optimizer))
    subject = f"loss of {type(model).__name__} of {facts.model.base.architecture} over {steps} steps"
    findings = () if drop.healthy else tuple(judge([drop, facts, facts.optimizer], Expect()))
    return Report(subject, findings, (drop_curve(subject, drop), *model_maps(facts.model, facts))), drop
