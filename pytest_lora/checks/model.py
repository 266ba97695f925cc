"""A live model with adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import refusing, require_expect, require_trainers
from pytest_lora.checks import NotJudged, report_on, rules_of
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.adapter_maps import model_maps
from pytest_lora.facts.measures import of_model
from pytest_lora.findings import Report
from pytest_lora.rules import without_consequences
from pytest_lora.rules.selection import codes

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from pytest_lora.facts.model import ModelFacts

NO_BATCH = "no batch given"
"""Why the rules on training are silent."""


@refusing
def check_model(
    model: nn.Module,
    *,
    batches: Mapping[str, Any] | Iterable[Any] | None = None,
    steps: int | None = None,
    optimizer: Optimizer | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge a model that carries LoRA adapters. Without batches it is looked at, never run or changed.

    With batches it also takes some real training steps, judges what they show, and is put back bit for bit; see
    ``check_training``.

    Args:
        model: Anything with PEFT LoRA layers: a ``PeftModel``, a ``PeftMixedModel``, a transformers model
            after ``add_adapter``, and these inside DDP, FSDP, ``torch.compile`` or a value head. What wraps it is
            judged too. No rank waits for another: of weights that FSDP divides, one rank sees shapes and no values,
            and the report says so (``not_judged``).
        batches: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches to train on.
        steps: Optimizer steps to take on them, at least 1; 3 by default.
        optimizer: The optimizer that is going to train it, if there is one already.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report with the rules of the stages *config* (1xx, for the active adapters) and *model* (2xx),
        those on the optimizer (3xx) where one is given, and with batches those of the stage *training* (3xx).

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: A code does not exist, or ``steps`` is out of its range or without batches.
    """
    from pytest_lora.inspection.model import model_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_trainers(optimizer, None, None)
    if steps is not None and batches is None:
        raise ValueError("steps needs batches to take them with; give batches too")
    facts = model_facts(model)
    judged: list[object] = [facts, *(c for c in facts.configs if c.adapter in facts.active)]
    # With batches the steps look at the optimizer, but only once is to be heard.
    if optimizer is not None and batches is None:
        from pytest_lora.inspection.training import optimizer_facts

        judged.append(optimizer_facts(model, optimizer))
    subject = f"{type(model).__name__} of {facts.base.title}"
    unseen = batches is None and expect.purpose == "train"
    left: NotJudged = ((NO_BATCH, rules_of("training")),) if unseen else ()
    left += unseen_values(facts)
    report = report_on(subject, judged, expect, select, ignore, model_maps(facts), of_model(facts), left)
    if batches is None:
        return report
    from pytest_lora.checks.training import (
        PROBE_STEPS,
        check_training,
    )  # what is only looked at takes no steps

    taken = PROBE_STEPS if steps is None else steps
    trained = check_training(
        model, batches, optimizer=optimizer, steps=taken, expect=expect, select=select, ignore=ignore
    )
    findings = without_consequences((*report.findings, *trained.findings))
    return Report(subject, findings, trained.figures, report.measured)


def unseen_values(facts: ModelFacts) -> NotJudged:
    """What FSDP keeps from one process: values of tensors that it divides."""
    if not facts.wrappers.unseen:
        return ()
    why = f"FSDP divides weights among {facts.wrappers.ranks} ranks"
    return ((why, f"values and gradients of {facts.wrappers.unseen} adapter tensors"),)


@refusing
def check_adapters_in_sync(
    model: nn.Module,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether every rank has the same adapter, bit for bit; call it on all ranks, after an optimizer step.

    What is compared are the adapter's weights and all that is trained. Sharded weights (FSDP) are put together
    first, by all ranks at once.

    Args:
        model: A model with LoRA layers, also inside DDP or FSDP.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        The same report on every rank, with code LORA950 where weights differ: their names, the ranks, by how much.

    Raises:
        RuntimeError: There is no process group.
        TypeError: The model has no adapter, or an argument has the wrong type.
        ValueError: A code does not exist.
    """
    from pytest_lora.inspection.ranks import sync_facts

    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    facts = sync_facts(model)
    return report_on(f"adapter on {facts.ranks} ranks", [facts], expect, select, ignore)
