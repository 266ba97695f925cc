from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import Severity, grouped, starred
from pytest_lora.rules import Violation, rule


@rule("LORA442", severity="error", needs=CheckpointFacts)
def saved_adapter_holds_no_update(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The factors of a saved adapter are zero, so that it changes nothing.

    ## What it does
    Looks for modules of which one factor is all zero (usually lora_B, which starts at zero). Under
    `Expect(fresh=True)` that is meant. Layers at zero beside trained layers of the same kind are a warning.

    ## Why is this bad?
    The adapter was saved before training, or training did not reach it: the optimizer did not hold it, or
    another copy was trained.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/peft/issues/793
    - https://github.com/huggingface/peft/issues/1402
    """
    if not facts.is_judged or expect.fresh is True:
        return
    whole = [
        m for m in facts.adapted if m.a and m.b and m.a.numbers and m.b.numbers and m.a.values and m.b.values
    ]
    dead = [m for m in whole if m.holds_nothing]
    if not dead:
        return
    alive = {starred(m.name) for m in whole if not m.holds_nothing}
    part = "lora_B" if dead[0].b and dead[0].b.values and dead[0].b.values.zero else "lora_A"
    beside = [m for m in dead if starred(m.name) in alive]
    kind: Severity | None = None
    if len(dead) < len(whole):
        kind = "warning" if beside and not all("expert" in m.name for m in beside) else "info"
    yield Violation(
        where=grouped(m.name for m in dead),
        observed=f"{part} is all zero in {len(dead)} of {len(whole)} modules: the adapter changes nothing there",
        expected="trained values",
        fix="check that the optimizer held the adapter and that the trained copy was saved, then train and save again",
        severity=kind,
    )
