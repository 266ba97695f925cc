from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.sweep import LockedRankFacts, is_enough, percent
from pytest_lora.rules import Violation, rule


@rule("LORA940", severity="error", needs=LockedRankFacts)
def rank_no_longer_suffices(facts: LockedRankFacts, expect: Expect) -> Iterator[Violation]:
    """The rank in use reaches too little of what the best rank of a sweep reaches.

    ## What it does
    Compares the improvement over the metric before training with that of the best rank; without a metric before
    training, the metrics themselves. By default 95 % is enough.

    ## Why is this bad?
    Data and base have changed since the rank was chosen. A rank that was enough then leaves quality on the table now.

    ## Example
    ```python
    rows = [TrialRow(4, 8, 0, metric=0.70), TrialRow(8, 16, 0, metric=0.90), TrialRow(16, 32, 0, metric=0.91)]
    sweep = SweepResult("accuracy", True, 0.5, tuple(rows), {}, {})
    report = check_rank_suffices(sweep, 4)
    ```

    ## Use instead
    ```python
    rows = [TrialRow(4, 8, 0, metric=0.70), TrialRow(8, 16, 0, metric=0.90), TrialRow(16, 32, 0, metric=0.91)]
    sweep = SweepResult("accuracy", True, 0.5, tuple(rows), {}, {})
    report = check_rank_suffices(sweep, 8)
    ```

    ## References
    - Section 7.2: https://arxiv.org/abs/2106.09685
    """
    locked = facts.locked
    if locked.share is None or is_enough(locked.share, facts.wanted):
        return
    known = {one.share: one for one in reversed(facts.ranks) if one.share is not None}
    best = known[max(known)]
    enough = next(one for one in facts.ranks if one.share is not None and is_enough(one.share, facts.wanted))
    has = percent(enough.share or 0.0, facts.wanted)
    observed = (
        f"{facts.metric} is {locked.metric} at r={locked.rank} and {best.metric} at r={best.rank}, "
        f"{percent(locked.share, facts.wanted)} of the best"
    )
    yield Violation(
        where=facts.where,
        observed=observed if facts.before is None else f"{observed}, counted from {facts.before} before",
        expected=f"at least {percent(facts.wanted)} of the best",
        fix=f"r={enough.rank} has {has}: lock that, or look at what changed in the data",
    )
