"""Properties of adapters that a test may pin down: share of parameters, scaling, shapes, adapted modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import (
    refusing,
    require_expect,
    require_loss_fn,
    require_steps,
)
from pytest_lora.checks import report_on
from pytest_lora.checks.training import PROBE_RATE
from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ParameterShareFacts, UpdateRankFacts
from pytest_lora.findings import Report
from pytest_lora.rules.selection import codes
from pytest_lora.values import require_items, require_number, require_real, shown

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from pytest_lora.inspection.training import LossFn


@refusing
def check_param_ratio(
    model: nn.Module,
    low: float = 0.0005,
    high: float = 0.01,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether the share of trainable parameters lies in a band.

    Both sides are logical: 4-bit weights count as what they stand for (see ``count_parameters``).

    Args:
        model: A model that carries LoRA layers.
        low: Smallest share, as a fraction. Default 0.05 %.
        high: Largest share, as a fraction. Default 1 %. LoRA (arXiv:2106.09685) trains 0.003 to 0.6 % of a
            large base; tiny test models need a band of their own.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report; code LORA901.

    Raises:
        TypeError: ``model`` carries no LoRA layers, or a bound is no number.
        ValueError: A bound is no fraction from 0 to 1, ``low`` is above ``high``, or a code does not exist.
    """
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    for name, bound in (("low", low), ("high", high)):
        if not 0 <= require_real(name, bound) <= 1:
            raise ValueError(f"{name} must be a fraction from 0 to 1 (0.01 is 1 %), not {shown(bound)}")
    if low > high:
        raise ValueError(f"low must not be above high, but low={low!r} and high={high!r}")

    from pytest_lora.counting import count_parameters
    from pytest_lora.inspection.properties import subject_of

    subject = subject_of(model)
    counted = count_parameters(model)
    facts = ParameterShareFacts(
        model=type(model).__name__,
        trainable=counted.trainable,
        adapter=counted.adapter,
        total=counted.total,
        stored=counted.stored,
        low=low,
        high=high,
    )
    return report_on(subject, [facts], expect, select, ignore)


@refusing
def check_alpha_ratio(
    model_or_config: nn.Module | LoraConfig,
    expected: float = 2.0,
    *,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether the effective scaling of every adapted module is one number.

    The scaling is ``alpha / r``, under rsLoRA ``alpha / sqrt(r)``, with ``rank_pattern`` and
    ``alpha_pattern`` applied. On a model it is read from every module with every adapter; of a
    ``LoraConfig`` alone, the default and each pattern key are judged as if some module took them.

    Args:
        model_or_config: A model that carries LoRA layers, or a ``LoraConfig``.
        expected: The scaling. Default 2, the usual ``alpha = 2 r``.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report; code LORA902 where a scaling differs by more than one part in a million.

    Raises:
        TypeError: An argument has the wrong type, or the model carries no LoRA layers.
        ValueError: ``expected`` is not a finite number above 0, a configured rank is below 1, or a code does not exist.
    """
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_number("expected", expected, above=0.0)

    from torch import nn

    from pytest_lora.inspection.properties import scaling_facts, subject_of

    facts = scaling_facts(model_or_config, expected)
    subject = subject_of(model_or_config) if isinstance(model_or_config, nn.Module) else "LoraConfig"
    return report_on(subject, [facts], expect, select, ignore)


@refusing
def check_adapter_shapes(
    model: nn.Module,
    targets: str | Iterable[str] | None = None,
    *,
    batches: Mapping[str, Any] | Iterable[Any] | None = None,
    steps: int = 2,
    loss_fn: LossFn | None = None,
    expect: Expect | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Judge whether the factors of every adapter fit its rank and its base weight.

    With batches it also takes real optimizer steps, and judges whether what moved is low-rank: the change of each
    adapted weight, ``scaling * B @ A`` after the steps less what it was before, together with what the base weight
    itself moved by, has a numerical rank of r at most, and the base weight did not move. Where ``B @ A`` was not
    zero before, as in a trained adapter or under PiSSA, the bound is 2 r: the difference of two products of rank r is
    one product with twice as many columns, ``[B B'] [A; -A']``. The magnitude of DoRA, which rescales whole rows, is
    left out. No step is taken where a shape does not fit, as that model cannot run. Afterwards everything is bit
    for bit what it was.

    Args:
        model: A model that carries LoRA layers.
        targets: What must be adapted, all of it and nothing else, written as PEFT's ``target_modules``:
            module names or their last parts, a regular expression for full names, or ``"all-linear"``. A
            module counts as adapted when any adapter is on it.
        batches: One batch (a dict of tensors for ``model(**batch)``) or an iterable of batches to train on.
        steps: Optimizer steps to take on them, at least 1. The second is the first that moves ``lora_A``.
        loss_fn: Called with the model and a batch, gives a scalar loss; by default the loss that the model returns.
        expect: What is meant, where only the user can know it.
        select: Codes, or starts of codes, to look at; all when empty.
        ignore: Codes, or starts of codes, to leave out.

    Returns:
        A report; codes LORA903 (shapes), LORA904 (updates) and LORA905 (targets).

    Raises:
        TypeError: ``model`` carries no LoRA layers, ``targets`` is neither names nor a pattern, or another argument
            has the wrong type.
        ValueError: ``targets`` is empty or no regular expression, ``steps`` is below 1, ``loss_fn`` is without
            batches, the model gives no loss, or a code does not exist.
    """
    expect = require_expect(expect)
    select, ignore = codes("select", select), codes("ignore", ignore)
    require_steps(steps)
    require_loss_fn(loss_fn)
    if loss_fn is not None and batches is None:
        raise ValueError("loss_fn needs batches to make a loss of; give batches too")
    wanted = _require_targets(targets)

    from pytest_lora.inspection.properties import shape_facts, subject_of, target_facts
    from pytest_lora.inspection.training import Plan, training_facts

    shapes = shape_facts(model)
    facts: list[object] = [shapes]
    if batches is not None and not shapes.misfits:
        plan = Plan(steps=steps, rate=PROBE_RATE, loss_fn=loss_fn, ranks=True)
        taken = training_facts(model, batches, plan)
        facts.append(UpdateRankFacts(type(model).__name__, len(taken.steps), taken.updates))
    if wanted is not None:
        facts.append(target_facts(model, wanted))
    return report_on(subject_of(model), facts, expect, select, ignore)


def _require_targets(targets: Any) -> str | tuple[str, ...] | None:
    if targets is None:
        return None
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets: {shown(targets)} is no regular expression: {error}") from error
        names: tuple[Any, ...] = (targets,)
    else:
        names = require_items("targets", targets, "module names or a regular expression")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"targets must be module names, but one is {shown(wrong[0])}")
    if not names or "" in names:
        raise ValueError(
            f"targets must not be empty, got {shown(targets)}; leave it out to check shapes only"
        )
    return targets if isinstance(targets, str) else names
