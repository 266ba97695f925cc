from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.sweep import RankLockFacts
from pytest_lora.rules import Violation, rule


@rule("LORA942", severity="error", needs=RankLockFacts)
def training_leaves_the_locked_rank(facts: RankLockFacts, expect: Expect) -> Iterator[Violation]:
    """What is trained with is not what was locked.

    ## What it does
    Compares `r`, `lora_alpha` and the learning rate in use with those in the lock of a sweep.

    ## Why is this bad?
    The evidence is about another adapter: nobody has measured that the rank in use suffices, or that its rate is right
    for its scaling.

    ## Example
    ```python
    rows = [TrialRow(4, 8, 0, metric=0.70), TrialRow(8, 16, 0, metric=0.90), TrialRow(16, 32, 0, metric=0.91)]
    lock = RankLock.of(SweepResult("accuracy", True, 0.5, tuple(rows), {}, {}))
    report = check_rank_suffices(lock, config=LoraConfig(r=4, lora_alpha=8))
    ```

    ## Use instead
    ```python
    rows = [TrialRow(4, 8, 0, metric=0.70), TrialRow(8, 16, 0, metric=0.90), TrialRow(16, 32, 0, metric=0.91)]
    lock = RankLock.of(SweepResult("accuracy", True, 0.5, tuple(rows), {}, {}))
    report = check_rank_suffices(lock, config=LoraConfig(r=lock.rank, lora_alpha=lock.alpha))
    ```

    ## References
    - Section 7.2: https://arxiv.org/abs/2106.09685
    """
    if not facts.in_use:
        return
    locked = " with ".join(f"{name}={locked}" for name, locked, _ in facts.in_use)
    yield Violation(
        where=facts.where,
        observed=", ".join(f"{name} is {now}" for name, _, now in facts.in_use),
        expected=f"{locked}, as locked",
        fix=f"set {locked}; or sweep again and lock what that chooses",
    )
