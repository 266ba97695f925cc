from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from pytest_lora.expect import Expect
from pytest_lora.facts.curve_shape import FEWEST_LOSSES, FITS
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule

_ROUNDED_AWAY = 0.01
"""From a loss below this the next ones may be zero by rounding: the Trainer logs four decimals."""

_FEWEST_BETWEEN, _FAR_BELOW = 2, 0.25
"""Zeros among other losses, and the share of the middle of these below which none of them lies: small batches of a
classifier or of preferences come close to zero before one of them is logged as zero."""


@rule("LORA341", severity="error", needs=HistoryFacts)
def loss_drops_to_exactly_zero(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss is exactly zero from some step on, or again and again.

    ## What it does
    Looks for two or more losses of exactly zero at the end, unless the losses before fell so low that their
    logged digits may have been rounded away. Zeros from the start are a warning, and nothing where `check_training`
    sees that a loss of zero leaves a gradient, or where some are 0.0 and some -0.0, rounded from either side. Two or
    more zeros among ten others or more, none of which lies below a quarter of their median, are a warning too.

    ## Why is this bad?
    A cross-entropy loss never gets to zero. The Trainer leaves NaN steps out of the loss that it logs
    (`logging_nan_inf_filter`), so that a run which is NaN from some step on shows a loss of 0.0. The adapter
    is NaN by then. Single zeros are batches without any target. A loss that is zero from the start also comes from
    batches whose labels are all ignored, and rightly from policy gradients (GRPO), whose advantages add up to nothing
    while their gradients do not.

    ## Example
    ```python
    report = diagnose_history([1.0778, 0.0, 0.0, 0.0, 0.0])
    ```

    ## Use instead
    ```python
    report = diagnose_history([1.0778, 0.9613, 0.9121, 0.8437, 0.8002])
    ```

    ## References
    - https://github.com/hiyouga/LlamaFactory/issues/8088
    """
    first = facts.zero_from
    yield from _zeros_between(facts)
    if (
        first is None
        or _of_either_sign(facts.train[first:])
        or facts.zero_has_gradient
        or (first and abs(facts.train[first - 1]) < _ROUNDED_AWAY)
    ):
        return
    before = f" after {facts.train[first - 1]:.4g}" if first else ", from the start"
    yield Violation(
        where="train_losses",
        observed=f"the last {len(facts.train) - first} losses are exactly 0, from step {facts.step(first)}{before}",
        expected="a loss above zero; 0 is how the Trainer logs a NaN step",
        fix="set logging_nan_inf_filter=False to see the NaN, load the adapter anew, and train it in float32 or "
        "bfloat16; if the loss was 0 from the start, see whether any label differs from -100 (only a policy gradient "
        "may begin so)",
        severity=None if first else "warning",
    )


def _of_either_sign(zeros: Sequence[float]) -> bool:
    """Whether zeros were rounded from losses above and below it, as those of a policy gradient are."""
    return len({math.copysign(1.0, zero) for zero in zeros}) > 1


def _zeros_between(facts: HistoryFacts) -> Iterator[Violation]:
    losses = [loss for loss in facts.train[: facts.zero_from] if math.isfinite(loss)]
    others = [loss for loss in losses if loss]
    zeros = len(losses) - len(others)
    if facts.zero_has_gradient or zeros < _FEWEST_BETWEEN or len(others) < max(zeros, FEWEST_LOSSES):
        return
    least = min(others)
    if least < max(FITS, _FAR_BELOW * median(others)):
        return
    yield Violation(
        where="train_losses",
        observed=f"{zeros} losses are exactly 0, the first at step {facts.step(facts.train.index(0))}, among "
        f"{len(others)} of which none is below {least:.4g}",
        expected="a loss above zero in every step; 0 is how the Trainer logs a NaN step",
        fix="look at the batches of these steps: leave out examples in which no label differs from -100 (a prompt that "
        "is truncated before its answer has none), and set logging_nan_inf_filter=False to see a NaN",
        severity="warning",
    )
