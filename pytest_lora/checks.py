"""Checks: inspect, judge, report. Each returns a Report and leaves everything as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_lora.exhibition import (
    checkpoint_maps,
    config_maps,
    drop_curve,
    history_curve,
    memory_budget,
    model_maps,
)
from pytest_lora.expect import Expect
from pytest_lora.findings import Report
from pytest_lora.rules import judge

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import torch
    from peft import LoraConfig
    from torch import Tensor, nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PretrainedConfig

    from pytest_lora.facts.base import BaseFacts
    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.facts.memory import MemoryEstimate
    from pytest_lora.facts.training import LossDrop
    from pytest_lora.findings import Finding
    from pytest_lora.inspection.checkpoint.fit import Base
    from pytest_lora.inspection.training import LossFn


def check_config(
    config: LoraConfig,
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    *,
    expect: Expect | None = None,
) -> Report:
    """Judge a ``LoraConfig`` against the base it is for, before anything is built or trained.

    PEFT itself puts the adapter on a copy of the base's structure on the meta device: no weights are read
    but those of a task head, nothing is changed, and what PEFT refuses becomes a finding.

    Args:
        config: The configuration; it is not changed.
        base: A live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.
        expect: What is meant, where only the user can know it.

    Returns:
        A report with the rules of the stage *config* (codes 1xx).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base cannot be read or built.
    """
    from pytest_lora.inspection.config import config_facts

    expect = require_expect(expect)
    facts = config_facts(config, base)
    return Report(f"LoraConfig on {_named(facts.base)}", tuple(judge([facts], expect)), config_maps(facts))


def check_model(
    model: nn.Module, *, optimizer: Optimizer | None = None, expect: Expect | None = None
) -> Report:
    """Judge a model that carries LoRA adapters; it is looked at, never run or changed.

    Args:
        model: Anything with PEFT LoRA layers: a ``PeftModel``, a ``PeftMixedModel``, a transformers model
            after ``add_adapter``, and these inside DDP, ``torch.compile`` or a value head.
        optimizer: The optimizer that is going to train it, if there is one already.
        expect: What is meant, where only the user can know it.

    Returns:
        A report with the rules of the stages *config* (1xx, for the active adapters) and *model* (2xx),
        and those on the optimizer (3xx) where one is given.

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
    """
    from pytest_lora.inspection.model import model_facts
    from pytest_lora.inspection.training import optimizer_facts

    expect = require_expect(expect)
    facts = model_facts(model)
    judged: list[object] = [facts, *(c for c in facts.configs if c.adapter in facts.active)]
    if optimizer is not None:
        judged.append(optimizer_facts(model, optimizer))
    subject = f"{type(model).__name__} of {_named(facts.base)}"
    return Report(subject, tuple(judge(judged, expect)), model_maps(facts))


def check_memory(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    config: LoraConfig,
    *,
    batch_size: int,
    seq_len: int,
    budget: str | int | torch.device,
    advise: bool = True,
    expect: Expect | None = None,
    **setting: Any,
) -> Report:
    """Judge whether a training step fits the memory of a GPU, without a GPU and without weights.

    Where it does not fit, other settings are estimated too, and the smallest change that fits comes first.

    Args:
        base: As for ``estimate_memory``.
        config: The adapter.
        batch_size: Sequences (or images) in a micro-batch.
        seq_len: Tokens in each, padding included.
        budget: GPU memory: ``"24GiB"``, whole bytes, or a CUDA device (``"cuda:0"``), which is asked.
        advise: Whether other settings are estimated where it does not fit, which takes a second or two. A
            search over many settings does without.
        expect: What is meant, where only the user can know it.
        setting: The other arguments of ``estimate_memory``: ``quantization``, ``dtype``,
            ``gradient_checkpointing``, ``optimizer`` and so on.

    Returns:
        A report with the rules of the stage *memory* (codes 5xx).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, the budget has no unit, or the step cannot be traced.
    """
    from pytest_lora.memory import estimate_memory
    from pytest_lora.memory_budget import require_budget

    expect = require_expect(expect)
    if not isinstance(advise, bool):
        raise TypeError(f"advise must be True or False, not {advise!r}")
    limit = require_budget(budget)
    estimate = estimate_memory(base, config, batch_size=batch_size, seq_len=seq_len, **setting)
    return _judge_memory(base, config, setting, estimate, limit, expect, advise=advise)


def judge_memory(model: nn.Module, estimate: MemoryEstimate, budget: int) -> Report:
    """The report on an estimate that ``estimate_of_model`` made; ``budget`` in bytes."""
    from pytest_lora.inspection.memory.live_model import described

    asked = estimate.setting
    found = described(model, asked.batch_size, asked.seq_len)
    if found is None:
        return Report(f"memory of a training step of {estimate.architecture}")
    setting = {name: value for name, value in asdict(asked).items() if name not in ("batch_size", "seq_len")}
    setting["quantization"] = asked.quantization
    return _judge_memory(found.base, found.config, setting, estimate, budget, Expect())


def _judge_memory(
    base: Any,
    config: LoraConfig,
    setting: dict[str, Any],
    estimate: MemoryEstimate,
    limit: int,
    expect: Expect,
    *,
    advise: bool = True,
) -> Report:
    from pytest_lora.facts.memory import MemoryFacts
    from pytest_lora.what_if import alternatives

    wanted = advise and estimate.peak_allocated > limit
    others = alternatives(base, config, setting, estimate, limit) if wanted else ()
    subject = f"memory of a training step of {estimate.architecture}"
    judged = MemoryFacts(estimate, limit, others)
    return Report(subject, tuple(judge([judged], expect)), (memory_budget(judged),))


OF_SAVED_CONFIGS = frozenset(
    f"LORA{number}" for number in (101, 102, 103, 107, 108, 110, 114, 119, 120, 122, 124, 126, 127, 130)
)
"""Rules of the stage *config* that still matter when the training is over: what the adapter does on its base. Keys and
shapes say more about its targets than the names in its configuration."""


def check_checkpoint(
    path: str | os.PathLike[str],
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
    *,
    expect: Expect | None = None,
) -> Report:
    """Judge a saved adapter: whether its configuration, keys, shapes, dtypes, values and base belong together.

    The folder may come from anywhere. Nothing in it is unpickled (unless ``expect.read_pickle`` asks for it),
    imported or executed, no link out of it is followed, nothing is fetched. Headers are read first; values are read a
    few megabytes at a time, 2 GiB at most. What cannot be read is a finding, not an exception.

    Args:
        path: The adapter's folder, or a file in it.
        base: The base that it is for: a live model, a ``PretrainedConfig``, or the path of a model folder or
            ``config.json`` (no weights are read). Without one, what the folder says itself is compared.
        expect: What is meant. ``fresh=True`` for an adapter saved before training, ``pretrained_head=True`` where the
            task head comes with the base, ``new_tokens`` for rows added to the vocabulary, ``config`` for what the
            adapter was to be.

    Returns:
        A report with the rules of the stage *checkpoint* (codes 4xx), and those rules of the stage *config* (1xx) that
        matter to a trained adapter: with a base all of these, without one those on its scaling and on what ``expect``
        says of rank, alpha, targets and scope.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is nothing at ``path``, or the base cannot be read or built.
    """
    from pytest_lora.inspection.checkpoint import folder_of

    expect = require_expect(expect)
    folder = folder_of(path)
    return judge_checkpoint(folder, None if base is None else checkpoint_base(base), expect)


def checkpoint_base(base: Any) -> Base:
    """A base that adapters are compared with, built once for all of them.

    Raises:
        TypeError: It is nothing that a base can be made of.
        ValueError: It cannot be read or built, or carries adapters itself.
    """
    from pytest_lora.inspection.checkpoint.fit import Base

    return Base(base)


def judge_checkpoint(folder: Path, base: Base | None, expect: Expect) -> Report:
    """The report on one adapter folder; see ``check_checkpoint``."""
    from pytest_lora.facts.saved_config import config_of_the_file
    from pytest_lora.inspection.checkpoint import checkpoint_facts

    facts = checkpoint_facts(folder, base, read_pickle=expect.read_pickle)
    findings = list(judge([facts], expect))
    fit = facts.fit
    if fit is not None and fit.config is not None and not facts.is_foreign:
        findings += [f for f in judge([fit.config], expect) if _still_matters(f, facts, expect)]
    elif fit is None and (config := config_of_the_file(facts)) is not None:
        findings += judge([config], expect, only=OF_FILES_ALONE)
    subject = f"adapter {facts.name}"
    named = subject if fit is None else f"{subject} on {_named(fit.base)}"
    return Report(named, tuple(findings), checkpoint_maps(facts))


OF_FILES_ALONE = frozenset(f"LORA{number}" for number in (101, 102, 103, 108, 114, 126, 127))
"""Those that need no base: what rank, alpha and names in the folder itself say."""

OF_REFUSED_CONFIGS = OF_SAVED_CONFIGS | {"LORA104", "LORA105"}
"""Where PEFT cannot put the adapter on the base, so that keys were not compared, the names have to tell why."""


def _still_matters(finding: Finding, facts: CheckpointFacts, expect: Expect) -> bool:
    if facts.fit is None:
        return False
    if finding.code == "LORA113" and expect.will_merge:
        return facts.fit.compared
    if finding.code not in (OF_SAVED_CONFIGS if facts.fit.compared else OF_REFUSED_CONFIGS):
        return False
    # PEFT saves whole embeddings where the vocabulary was resized, whatever the configuration says.
    embeddings = facts.fit.base.input_embeddings
    return finding.code != "LORA119" or embeddings is None or not facts.holds(embeddings)


def _named(base: BaseFacts) -> str:
    packed = next((m.quantization for m in base.modules if m.quantization), None)
    return f"{base.architecture} in {packed}" if packed else base.architecture


def diagnose_history(
    train_losses: Iterable[float],
    eval_losses: Iterable[float] | Mapping[int, float] | None = None,
    *,
    total_steps: int | None = None,
    steps_per_loss: int = 1,
    learning_rate: float | None = None,
    expect: Expect | None = None,
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
        learning_rate: The peak learning rate; advice then says from which to which.
        expect: What is meant; with ``expect.config`` advice on the rank says from which to which.

    Returns:
        A report with the rules on a history (codes LORA340 to LORA359).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no training losses, or a number is outside its range.
    """
    from pytest_lora.facts.history import history_facts

    expect = require_expect(expect)
    facts = history_facts(
        train_losses,
        eval_losses,
        total_steps=total_steps,
        steps_per_loss=steps_per_loss,
        learning_rate=learning_rate,
    )
    count = len(facts.train)
    subject = f"history of {count} training loss{'es' if count > 1 else ''}"
    return Report(subject, tuple(judge([facts], expect)), (history_curve(subject, facts),))


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
    _require_norm(max_grad_norm)
    plan = Plan(
        steps=steps if expect.purpose == "train" else 0,
        rate=PROBE_RATE,
        optimizer=optimizer,
        scheduler=scheduler,
        max_grad_norm=max_grad_norm,
        scaler=scaler,
        history=_require_history(history),
        base_snapshot=_require_snapshot(base_snapshot),
        loss_fn=loss_fn,
        tell_failures=True,
    )
    facts = training_facts(model, batches, plan)
    judged: list[object] = [facts, facts.optimizer]
    if plan.history:
        judged.append(history_facts(plan.history, zero_has_gradient=facts.zero_has_gradient))
    subject = f"training of {type(model).__name__} of {_named(facts.model.base)}"
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
    _require_at_least("lr", lr, least=0.0)
    _require_at_least("by", by, least=0.0)
    if lr is not None and optimizer is not None:
        raise ValueError("lr is for the optimizer that is made here; set it in the optimizer that you give")
    if by is None:
        by = OWN_DROP if optimizer is None and lr is None else GIVEN_DROP
    plan = Plan(steps=steps, rate=lr, optimizer=optimizer, loss_fn=loss_fn)
    facts, drop = loss_drop(model, batches, plan, by, place(model, device, optimizer))
    subject = f"loss of {type(model).__name__} of {facts.model.base.architecture} over {steps} steps"
    findings = () if drop.healthy else tuple(judge([drop, facts, facts.optimizer], Expect()))
    return Report(subject, findings, (drop_curve(subject, drop), *model_maps(facts.model, facts))), drop


def _require_at_least(name: str, value: Any, *, least: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a finite number of at least {least:g}, not {value!r}")


def require_steps(steps: Any) -> None:
    """Raise unless ``steps`` is a whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be a whole number, not {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")


def require_trainers(optimizer: Any, scheduler: Any, scaler: Any, loss_fn: Any) -> None:
    """Raise where one of these is nothing of its kind."""
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must be a learning-rate scheduler, not {type(scheduler).__name__}")
    if scheduler is not None and optimizer is None:
        raise ValueError("scheduler needs the optimizer whose learning rate it sets; give optimizer too")
    if scaler is not None and not callable(getattr(scaler, "unscale_", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be called with a model and a batch; {type(loss_fn).__name__} cannot be"
        )


def _require_norm(norm: Any) -> None:
    if norm is None:
        return
    if isinstance(norm, bool) or not isinstance(norm, (int, float)):
        raise TypeError(f"max_grad_norm must be a number, not {norm!r}")
    if math.isnan(norm) or norm < 0:
        raise ValueError(f"max_grad_norm must not be negative, got {norm!r}")


def _require_history(history: Any) -> tuple[float, ...]:
    if history is None:
        return ()
    if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Iterable):
        raise TypeError(f"history must be a sequence of losses, not {type(history).__name__}")
    try:
        return tuple(float(loss) for loss in history)
    except (TypeError, ValueError) as error:
        raise TypeError(f"history must hold numbers: {error}") from error


def _require_snapshot(snapshot: Any) -> Mapping[str, Tensor] | None:
    if snapshot is not None and not isinstance(snapshot, Mapping):
        raise TypeError(
            f"base_snapshot must map names to tensors, as state_dict() does, not {type(snapshot).__name__}"
        )
    return snapshot


def require_expect(expect: Any) -> Expect:
    """What is meant, the defaults for None; raise where it is something else."""
    if expect is None:
        return Expect()
    if not isinstance(expect, Expect):
        raise TypeError(f"expect must be an Expect, not {type(expect).__name__}")
    return expect
