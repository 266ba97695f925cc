"""A training: some real optimizer steps, put back bit for bit, and the losses that a run has logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import (
    refusing,
    require_expect,
    require_history,
    require_loss_fn,
    require_snapshot,
    require_steps,
    require_trainers,
)
from pytest_lora.checks import report_on
from pytest_lora.expect import Expect
from pytest_lora.facts.figures import Figure
from pytest_lora.facts.figures.adapter_maps import model_maps
from pytest_lora.facts.figures.curves import drop_curve, history_curve
from pytest_lora.facts.history import HistoryFacts, history_facts
from pytest_lora.facts.measures import of_drop, of_model
from pytest_lora.findings import Report
from pytest_lora.rules.selection import codes
from pytest_lora.values import require_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from pytest_lora.inspection.training import LossFn


PROBE_STEPS = 3
"""Steps of ``check_training``. The first moves ``lora_B``, the second gives ``lora_A`` its first gradient; one more, as
a warm-up may begin at a learning rate of zero."""


PROBE_RATE = 1e-3
"""Learning rate of the AdamW that ``check_training`` makes where it is given no optimizer."""


@refusing
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
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Take some real optimizer steps, judge what was seen, and put everything back bit for bit.

    Weights, buffers, gradients, training flags, attributes, configurations, hooks, optimizer, scheduler, scaler, random
    states and global settings are afterwards what they were, also when something raises half-way or Ctrl-C is pressed.
    Models of up to 256 MiB are copied for that. Of larger ones that is copied which training changes, and a frozen
    weight that changes all the same is an error with its name.

    What the model or the optimizer raises is a finding where its cause is known by its words; anything else, and what
    ``loss_fn`` raises, goes on. Where ``expect.purpose`` is not ``"train"``, no step is taken: labels and modes are
    looked at only.

    Args:
        model: Anything with PEFT LoRA layers; see ``check_model``. It is run in the mode that it is in.
        batches: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches, used in order and over
            again. None is taken before the arguments and the model are checked. At most ``steps`` are taken from an
            iterator, or one where no step is taken; of a list, ``steps`` or up to 64 are looked at.
        optimizer: The optimizer of the real run. By default an AdamW over everything that requires gradients.
        steps: Optimizer steps to take, at least 1. The default is 3.
        scheduler: The learning-rate schedule of the real run, stepped once an optimizer step.
        max_grad_norm: The norm at which the real run clips gradients.
        scaler: The GradScaler of the real run.
        history: Losses of the run so far, one an optimizer step or log line.
        base_snapshot: Weights and buffers of the base before training, by their name in the base or in ``model``.
        loss_fn: Called with the model and a batch, gives a scalar loss; by default the loss that the model returns.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules of the stage *training* (codes 3xx).

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: An argument is out of its range, there is no batch, the model gives no loss for one or has tensors
            that could not be put back, or a code does not exist.
        RuntimeError: Something changed that could not be put back; the message names it.
    """
    from pytest_lora.facts.history import history_facts
    from pytest_lora.inspection.training import Plan, training_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_steps(steps)
    require_trainers(optimizer, scheduler, scaler)
    require_loss_fn(loss_fn)
    if max_grad_norm is not None:
        require_number("max_grad_norm", max_grad_norm, least=0.0, finite=False)
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
    figures = model_maps(facts.model, facts)
    return report_on(subject, judged, expect, select, ignore, figures, of_model(facts.model))


OWN_DROP = 0.01
"""Relative drop asked of the learning rate that ``check_loss_decreases`` chooses. Healthy set-ups fall by 2 % at least,
broken ones not at all, as the same batches are compared without dropout (``benchmarks/loss_decreases.py``)."""


GIVEN_DROP = 0.0005
"""Relative drop asked of a learning rate or optimizer that the user chose, which may be made for thousands of steps."""


@refusing
def check_loss_decreases(
    model: nn.Module,
    batches: Mapping[str, Any] | Iterable[Any],
    *,
    steps: int = 20,
    by: float | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: float | None = None,
    loss_fn: LossFn | None = None,
    device: str | torch.device | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether some training steps lower the loss, and whether the adapter has a share in it.

    The mean loss of the same fixed batches is compared before and after, without dropout, so that two runs of the same
    set-up differ by rounding only. A loss that a head alone lowers does not pass, nor one that is NaN. Afterwards the
    model, the optimizer and the random states are bit for bit what they were.

    Args:
        model: Anything with PEFT LoRA layers; see ``check_model``.
        batches: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches, used in order and over
            again; at most ``steps`` are taken, and none before the arguments and the model are checked.
        steps: Optimizer steps, at least 1.
        by: The relative drop that is asked for, such as 0.1 for 10 %. By default 1 %, or 0.05 % where ``optimizer`` or
            ``learning_rate`` is given, which may be made for thousands of steps.
        optimizer: The optimizer of the real run. By default an AdamW over everything that requires gradients.
        learning_rate: Learning rate of that AdamW. By default one that suits rank, scaling and number of the adapters.
        loss_fn: Called with the model and a batch, gives a scalar loss; by default the loss that the model returns.
        device: Where to run, such as ``"cuda"``: model and batches are moved there for the time being. By default
            everything stays where it is, as a function or a data loader of yours may hold tensors that cannot be moved
            from here; the loss of the model itself gets its batch on the model's device in any case. A base in 8 bits
            is never moved, as bitsandbytes leaves its scales behind.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report without findings where the loss fell far enough; else what was measured and the likely reasons.
        ``report.measure("loss drop within 20 steps")`` is the relative drop.

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: An argument is out of its range, there is no batch, the model gives no loss for one or has tensors
            that could not be put back, or a code does not exist.
        RuntimeError: Something changed that could not be put back; the message names it.
    """
    from pytest_lora.inspection.model import adapted_survey
    from pytest_lora.inspection.training import Plan, loss_drop, place

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_steps(steps)
    require_trainers(optimizer, None, None)
    require_loss_fn(loss_fn)
    for name, value in (("learning_rate", learning_rate), ("by", by)):
        if value is not None:
            require_number(name, value, least=0.0)
    if learning_rate is not None and optimizer is not None:
        raise ValueError(
            "learning_rate is for the optimizer that is made here; set it in the optimizer that you give"
        )
    if by is None:
        by = OWN_DROP if optimizer is None and learning_rate is None else GIVEN_DROP
    adapted_survey(model)
    plan = Plan(steps=steps, rate=learning_rate, optimizer=optimizer, loss_fn=loss_fn)
    facts, drop = loss_drop(model, batches, plan, by, place(model, device, optimizer))
    subject = f"loss of {type(model).__name__} of {facts.model.base.architecture} over {steps} steps"
    judged: list[object] = [] if drop.healthy else [drop, facts, facts.optimizer]
    curve: tuple[Figure, ...] = (drop_curve(subject, drop),)
    figures = curve + model_maps(facts.model, facts)
    return report_on(subject, judged, expect, select, ignore, figures, of_drop(drop))


@refusing
def diagnose_history(
    train_losses: Iterable[float],
    eval_losses: Iterable[float] | Mapping[int, float] | None = None,
    *,
    total_steps: int | None = None,
    steps_per_loss: int = 1,
    learning_rate: float | Sequence[float] | None = None,
    vocabulary_size: int | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge the losses that a run has logged so far, and say what a practitioner would do.

    Nothing is run: this is about numbers from a log. Too little evidence is silence, not a guess.

    Args:
        train_losses: Training losses in their order, one or more, in nats per token or alike; from a
            ``Trainer``: ``[x["loss"] for x in trainer.state.log_history if "loss" in x]``. Below ten losses
            only what they show beyond doubt is judged.
        eval_losses: Losses on held-out data: a mapping from optimizer step to loss, or a list, which is
            taken as evenly spaced over the training losses.
        total_steps: Optimizer steps that the run is planned to have, at least 1. A plateau is then judged by
            the share of the run that has passed.
        steps_per_loss: Optimizer steps from one training loss to the next (the Trainer's ``logging_steps``).
        learning_rate: The peak learning rate, or one rate for each training loss. Advice then says from which to
            which; with the rate of each loss, warm-up and restarts of the schedule are not taken for faults.
        vocabulary_size: How many answers the loss chooses among, at least 2: tokens, or classes of a classifier. Losses
            are then compared with ln(vocabulary_size), that of a guess.
        expect: What is meant; with ``expect.config`` advice on the rank says from which to which.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules on a history (codes LORA340 to LORA359).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no training losses, a number is outside its range, or a code does not exist.
    """
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    facts = history_facts(
        train_losses,
        eval_losses,
        total_steps=total_steps,
        steps_per_loss=steps_per_loss,
        learning_rate=learning_rate,
        vocabulary_size=vocabulary_size,
    )
    return judge_history(facts, expect, select, ignore)


def judge_history(
    facts: HistoryFacts, expect: Expect, select: Iterable[str] = (), ignore: Iterable[str] = ()
) -> Report:
    """The report on a history; see ``diagnose_history``."""
    count = len(facts.train)
    subject = f"history of {count} training loss{'es' if count > 1 else ''}"
    return report_on(subject, [facts], expect, select, ignore, (history_curve(subject, facts),))
