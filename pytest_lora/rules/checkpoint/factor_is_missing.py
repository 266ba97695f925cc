from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA423", severity="error", needs=CheckpointFacts)
def factor_is_missing(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """A module has one of the two LoRA factors, but not the other.

    ## What it does
    Looks for lora_A without lora_B, lora_B without lora_A, and, under DoRA, for modules without their
    magnitude.

    ## Why is this bad?
    The product of the two is the update. A missing factor stays at its initial value: without lora_B the
    module does nothing, without lora_A it does something random.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: v for k, v in tensors.items() if "lora_B" not in k})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://arxiv.org/abs/2106.09685
    """
    if (
        not facts.is_judged
        or facts.misnamed
        or facts.is_foreign
        or (facts.fit is not None and facts.fit.loads)
    ):
        return
    dora = facts.settings is not None and facts.settings.use_dora
    lacking = {
        "lora_B": [m.name for m in facts.adapted if m.a is not None and m.b is None],
        "lora_A": [m.name for m in facts.adapted if m.b is not None and m.a is None],
        "lora_magnitude_vector": [m.name for m in facts.adapted if dora and m.a and m.b and not m.magnitude],
    }
    for part, names in lacking.items():
        if names:
            yield Violation(
                where=grouped(names),
                observed=f"{part} is missing in {len(names)} of {len(facts.adapted)} adapted modules of the file",
                expected="every tensor of every adapted module",
                fix="save the adapter again from the trained model; the file is not complete",
            )
