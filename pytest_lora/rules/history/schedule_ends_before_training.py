from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from pytest_lora.expect import Expect
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule

LEAST = 20
"""Losses without a rate that a verdict needs."""

SHARE = 0.1
"""Of the losses so far; a schedule that goes down to zero does so at its last step."""


@rule("LORA383", severity="warning", needs=HistoryFacts)
def schedule_ends_before_training(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The learning rate has come down to zero, and training goes on.

    ## What it does
    Looks, where the rate at each loss is given, for a rate of exactly zero over the last tenth of the losses and at
    least 20 of them, behind steps with a rate above zero.

    ## Why is this bad?
    Nothing has been learned since. A schedule is stepped once an optimizer step and is made for as many: one that is
    stepped at every micro-batch of an accumulation, or by each of several processes, is through with its decay after a
    part of the run.

    ## Example
    ```python
    rates = [2e-4 * max(0.0, 1 - i / 60) for i in range(120)]
    losses = [1.0 + 1.5 * 0.96 ** min(i, 60) + (37 * i * i % 101) / 1000 for i in range(120)]
    report = diagnose_history(losses, learning_rate=rates)
    ```

    ## Use instead
    ```python
    rates = [2e-4 * max(0.0, 1 - i / 120) for i in range(120)]
    losses = [1.0 + 1.5 * 0.96 ** i + (37 * i * i % 101) / 1000 for i in range(120)]
    report = diagnose_history(losses, learning_rate=rates)
    ```

    ## References
    - https://github.com/huggingface/accelerate/issues/963
    - https://github.com/huggingface/transformers/pull/24088
    """
    still = sum(1 for _ in takewhile(lambda rate: rate == 0, reversed(facts.rates)))
    if still >= LEAST and still >= SHARE * len(facts.rates) and any(facts.rates):
        since = (len(facts.rates) - still) * facts.steps_per_loss
        yield Violation(
            where="learning_rate",
            observed=f"the learning rate is 0 since step {since:,}, for {still * facts.steps_per_loss:,} steps, "
            f"{still / len(facts.rates):.0%} of the run so far: nothing is learned any more",
            expected="a schedule that ends with the run",
            fix="make the schedule for the optimizer steps of the whole run, and step it once each of them: not at "
            "every micro-batch, and under accelerate either prepared or stepped where accelerator.sync_gradients",
        )
