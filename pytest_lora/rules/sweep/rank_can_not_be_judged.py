from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.sweep import LockedRankFacts
from pytest_lora.rules import Violation, rule


@rule("LORA941", severity="error", needs=LockedRankFacts)
def rank_can_not_be_judged(facts: LockedRankFacts, expect: Expect) -> Iterator[Violation]:
    """A sweep does not say whether the rank in use is enough.

    ## What it does
    Looks whether the rank has a metric, and whether shares of the best one mean something.

    ## Why is this bad?
    A gate that cannot judge and passes all the same protects nothing.

    ## Example
    ```python
    rows = [TrialRow(8, 16, 0, metric=0.48), TrialRow(16, 32, 0, metric=0.49)]
    sweep = SweepResult("accuracy", True, 0.5, tuple(rows), {}, {})
    report = check_rank_suffices(sweep, 8)
    ```

    ## Use instead
    ```python
    rows = [TrialRow(8, 16, 0, metric=0.90), TrialRow(16, 32, 0, metric=0.91)]
    sweep = SweepResult("accuracy", True, 0.5, tuple(rows), {}, {})
    report = check_rank_suffices(sweep, 8)
    ```

    ## References
    - Section 7.2: https://arxiv.org/abs/2106.09685
    """
    locked = facts.locked
    if locked.share is not None:
        return
    if locked.metric is None:
        observed = f"no trial of this rank has a metric: {'; '.join(locked.failures)}"
        fix = "mend what failed, and sweep again"
    elif facts.before is None:
        observed = "the metric before training is not known, and not all metrics are above zero"
        fix = "look at why evaluate failed before training"
    else:
        observed = f"no rank is better than the {facts.before} before training"
        fix = "look at the training before the rank: assert_loss_decreases says whether it learns"
    yield Violation(facts.where, observed, "a share of the best", fix)
