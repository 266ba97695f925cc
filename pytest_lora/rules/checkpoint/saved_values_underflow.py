from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

LOST, COARSE = 0.05, 0.5
"""Zeros that a step of training does not leave, beside numbers of which half or more have lost digits: below 6.1e-5
float16 has fewer of them the smaller a number is, and below 3e-8 none."""


@rule("LORA446", severity="warning", needs=CheckpointFacts)
def saved_values_underflow(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """Trained values are too small for the float16 that they are saved in.

    ## What it does
    Looks at every lora_B in float16: whether 5 % or more of its numbers are zero and at least half of the others are
    below 6.1e-5, the smallest normal number of the format. Zeros beside larger numbers, as pruning and unused rows
    leave them, are not judged.

    ## Why is this bad?
    What was trained is rounded to a few multiples of 6e-8, and to zero below 3e-8. The file loads without a word, and
    the adapter does a part of what it learned or nothing.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda t: {k: (v * 1e-7 / v.std()).half() if "lora_B" in k else v for k, v in t.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    path = adapter()
    edit(path, lambda t: {k: (v * 1e-7 / v.std()).bfloat16() if "lora_B" in k else v for k, v in t.items()})
    report = check_checkpoint(path)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/type_info.html (smallest_normal)
    """
    if not facts.is_judged or expect.fresh is True:
        return
    measured = [
        (m, m.b.values.underflow) for m in facts.adapted if m.b and m.b.values and m.b.values.underflow
    ]
    lost = [
        (m, shares) for m, shares in measured if shares[0] < 1 and shares[0] >= LOST and shares[1] >= COARSE
    ]
    if lost:
        zeros = [shares[0] for _, shares in lost]
        yield Violation(
            where=f"{facts.weights} in {facts.name}: {grouped(m.name for m, _ in lost)}",
            observed=f"lora_B in float16 is zero at up to {max(zeros):.0%} of its places in {len(lost)} of "
            f"{len(facts.adapted)} modules, and most of the rest is below 6.1e-5: the values underflow",
            expected="a format with the range of the trained values",
            fix="save the trained adapter again in float32 or bfloat16, which reach down to 1e-38",
        )
