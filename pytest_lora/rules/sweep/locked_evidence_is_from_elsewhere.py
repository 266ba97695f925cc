from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.sweep import RankLockFacts
from pytest_lora.rules import Violation, rule

_SHOWN = 60
"""Characters of a setting; some are digests of functions."""


@rule("LORA943", severity="info", needs=RankLockFacts)
def locked_evidence_is_from_elsewhere(facts: RankLockFacts, expect: Expect) -> Iterator[Violation]:
    """The evidence of a locked rank is of other data, settings or versions.

    ## What it does
    Compares the data slice and the settings in a lock with those of the fresh sweep, and the versions (major and minor
    number) with what is installed.

    ## Why is this bad?
    It need not be. But which rank suffices depends on data and base, and a library may change how an adapter is
    started or scaled: a lock that is older than what it is used with is worth a sweep.

    ## Example
    ```python
    rows = [TrialRow(8, 16, 0, metric=0.90), TrialRow(16, 32, 0, metric=0.91)]
    then = SweepResult("accuracy", True, 0.5, tuple(rows), {"data": "reviews of 2025"}, {})
    now = SweepResult("accuracy", True, 0.5, tuple(rows), {"data": "reviews of 2026"}, {})
    report = check_rank_suffices(now, RankLock.of(then))
    ```

    ## Use instead
    ```python
    rows = [TrialRow(8, 16, 0, metric=0.90), TrialRow(16, 32, 0, metric=0.91)]
    now = SweepResult("accuracy", True, 0.5, tuple(rows), {"data": "reviews of 2026"}, {})
    report = check_rank_suffices(now, RankLock.of(now))
    ```

    ## References
    - Section 7.2: https://arxiv.org/abs/2106.09685
    """
    if not facts.drift:
        return
    said = ", ".join(f"{name} {_short(locked)} is now {_short(now)}" for name, locked, now in facts.drift)
    yield Violation(
        where=facts.where,
        observed=said,
        expected="the data, settings and versions that the rank was chosen with",
        fix="sweep again where that may matter, and lock what it chooses: result.lock(path)",
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
