from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import takewhile

from pytest_lora.expect import Expect
from pytest_lora.facts.curve_shape import FEWEST_LOSSES, FITS
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule

_ROUNDED_AWAY = 0.01
"""Losses below this may be equal by rounding: the Trainer logs four decimals."""


_AS_LOGGED = 1e-4
"""The last of the four decimals that the Trainer logs."""

_FEWEST_ALIKE, _SHARE_ALIKE = 3, 0.5
"""Three, and half of all: a schedule that ends early has one or two equal evaluations at its end. Numbers of three
significant digits or less may be equal by rounding."""

_UNDECIDED = (math.log(2), 0.5)
"""Where the losses of preference tuning begin (DPO, KTO); its small rates leave them there for the first logs."""


@rule("LORA343", severity="warning", needs=HistoryFacts)
def loss_never_moves(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The same losses come again and again, to the last digit.

    ## What it does
    Looks for five or more losses that are equal, or that repeat after the same number of steps, to the last
    digit, and are not small enough to be equal by rounding; or for evaluation losses of which the last three or more,
    and at least half, are equal to the last of four digits or more.

    ## Why is this bad?
    A step that changes a weight changes the loss of the same batch at least in its last digits. So nothing is
    trained: the learning rate is 0, no gradient reaches the adapter, or the optimizer holds other parameters
    than the model (it was made before the adapter, or for an earlier model).

    ## Example
    ```python
    report = diagnose_history([4.8517] * 8)
    ```

    ## Use instead
    ```python
    report = diagnose_history([4.8517, 4.8311, 4.7902, 4.7215, 4.6388, 4.5496, 4.4571, 4.3630])
    ```

    ## References
    - https://github.com/huggingface/peft/issues/859
    """
    period = facts.repetition
    if period is None and (alike := _evaluations_alike(facts)):
        yield Violation(
            where="eval_losses",
            observed=f"the last {alike} evaluation losses are all {facts.evals[-1].loss:.8g}, from step "
            f"{facts.evals[-alike].step} on",
            expected="evaluation losses that change while the model is trained",
            fix="see that the schedule leaves a learning rate above 0 there, that the optimizer holds the adapter, and "
            "that the model which is evaluated is the one that is trained",
        )
    if period is None or max(map(abs, facts.usable)) < _ROUNDED_AWAY:
        return
    observed = (
        f"all {len(facts.usable)} losses are {facts.usable[0]:.8g}"
        if period == 1
        else f"the same {period} losses come again to the last digit over all {len(facts.usable)} losses"
    )
    yield Violation(
        where="train_losses",
        observed=observed,
        expected="losses that change with every step of the optimizer",
        fix="make the optimizer after the adapter, from the parameters that require gradients; see that its "
        "learning rate is above 0, and that loss.backward() leaves gradients on lora_B",
        severity="info" if _undecided(facts) else None,
    )


def _evaluations_alike(facts: HistoryFacts) -> int:
    """How many evaluations at the end are equal to the last digit; 0 where these are few, or equal by rounding."""
    losses = [one.loss for one in facts.evals]
    alike = len(list(takewhile(lambda loss: loss == losses[-1], reversed(losses))))
    if alike < max(_FEWEST_ALIKE, _SHARE_ALIKE * len(losses)) or losses[-1] < FITS:
        return 0
    rounded = any(abs(losses[-1] - start) < _AS_LOGGED for start in (*_UNDECIDED, float(f"{losses[-1]:.3g}")))
    return 0 if rounded else alike


def _undecided(facts: HistoryFacts) -> bool:
    few = len(facts.train) < FEWEST_LOSSES
    return (
        few
        and any(abs(facts.train[0] - start) < _AS_LOGGED for start in _UNDECIDED)
        and facts.repetition == 1
    )
