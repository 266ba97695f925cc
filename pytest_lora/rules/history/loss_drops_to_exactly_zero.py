from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule

_ROUNDED_AWAY = 0.01
"""From a loss below this the next ones may be zero by rounding: the Trainer logs four decimals."""


@rule("LORA341", severity="error", needs=HistoryFacts)
def loss_drops_to_exactly_zero(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss is exactly zero from some step on.

    ## What it does
    Looks for two or more losses of exactly zero at the end, unless the losses before fell so low that their
    logged digits may have been rounded away. Zeros from the start are a warning, and nothing where `check_training`
    sees that a loss of zero leaves a gradient.

    ## Why is this bad?
    A cross-entropy loss never gets to zero. The Trainer leaves NaN steps out of the loss that it logs
    (`logging_nan_inf_filter`), so that a run which is NaN from some step on shows a loss of 0.0. The adapter
    is NaN by then. A loss that is zero from the start also comes from batches whose labels are all ignored, and
    rightly from policy gradients (GRPO), whose advantages add up to nothing while their gradients do not.

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
    if first is None or facts.zero_has_gradient or (first and abs(facts.train[first - 1]) < _ROUNDED_AWAY):
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
