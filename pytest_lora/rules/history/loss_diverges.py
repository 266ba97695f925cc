from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from pytest_lora.expect import Expect
from pytest_lora.facts.history import FITS, CurveFacts, HistoryFacts
from pytest_lora.findings import Severity
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import lower_rate

_ABOVE_START = 1.2
_LOST_ERROR, _LOST_WARNING = 0.5, 0.25
_LEARNED = 0.2
_ABOVE_LOWEST = 1.2
_CLEAR, _CLEAR_FROM_START = 5.0, 2.0
_FEWEST, _FEW = 5, 20
_SWINGS = 3
_SHORT_RISE, _SHORT_GOES_ON = 2.0, 1.1


@rule("LORA342", severity="error", needs=HistoryFacts)
def loss_diverges(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss ends above where it began, or gives back what it had gained.

    ## What it does
    Compares the level of the last losses with that of the first and with the lowest. It is divergence to end
    20 % above the start, or to give back half of the fall (a quarter: warning), where the rise is 5 times
    what the noise of these levels explains. Of less than 20 losses it is also
    divergence if the last three are at twice the first. A loss below 0.1 is no divergence, and one that swings
    down as well as up is left to LORA345. `benchmarks/history_diagnosis.py` measures how often this errs.

    ## Why is this bad?
    The steps are too large: the adapter has left the region in which the base works, and does not come back
    by itself.

    ## Example
    ```python
    report = diagnose_history([2.3, 2.2, 2.1, 2.2, 2.6, 3.1, 3.9, 4.8, 5.6, 6.1, 6.4, 6.6], learning_rate=1e-2)
    ```

    ## Use instead
    ```python
    report = diagnose_history([2.3, 2.2, 2.1, 2.0, 2.0, 1.9, 1.8, 1.8, 1.7, 1.7, 1.7, 1.6], learning_rate=1e-3)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1504
    """
    found = _short(facts) or (facts.curve and _long(facts, facts.curve))
    if found:
        severity, observed = found
        yield Violation(
            where="train_losses",
            observed=observed,
            expected="a loss that falls, and stays down",
            fix=f"load the adapter anew and {lower_rate(facts.learning_rate, 10)}, with warm-up over the first "
            "5 % of the steps and gradients clipped at 1.0",
            severity=severity,
        )


def _short(facts: HistoryFacts) -> tuple[Severity, str] | None:
    if not _FEWEST <= len(facts.usable) < _FEW:
        return None
    (start, second), last = facts.usable[:2], facts.usable[-3:]
    # A first batch may be an easy one; then the second loss is no lower than the last.
    goes_on = median(last) > _SHORT_GOES_ON * second
    if start < 0 or min(last) < max(FITS, _SHORT_RISE * start) or not goes_on:
        return None
    return "error", f"the loss rose from {start:.4g} to {last[-1]:.4g} in {facts.steps} steps"


def _long(facts: HistoryFacts, curve: CurveFacts) -> tuple[Severity, str] | None:
    start, lowest, end = curve.start, curve.lowest, curve.end
    if end.value < FITS:
        return None
    clear = end.value > _ABOVE_LOWEST * lowest.value and end.above(lowest) > _CLEAR
    if not clear:
        return None
    if end.value > _ABOVE_START * start.value and end.above(start) > _CLEAR_FROM_START:
        return (
            "error",
            f"the loss began at {start.value:.4g} and is {end.value:.4g} after {facts.steps} steps",
        )
    fall, rise = start.value - lowest.value, end.value - lowest.value
    learned = fall > _LEARNED * start.value and start.above(lowest) > _CLEAR_FROM_START
    if curve.swings >= _SWINGS or not (learned and rise > _LOST_WARNING * fall):
        return None
    return (
        "error" if rise > _LOST_ERROR * fall else "warning",
        f"the loss fell from {start.value:.4g} to {lowest.value:.4g} at step {facts.step(lowest.middle)} and is "
        f"{end.value:.4g} after {facts.steps} steps: {rise / fall:.0%} of the fall is lost",
    )
