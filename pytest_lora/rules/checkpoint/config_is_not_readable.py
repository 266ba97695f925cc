from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA412", severity="error", needs=CheckpointFacts)
def config_is_not_readable(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """adapter_config.json cannot be read.

    ## What it does
    Reads the file as JSON, with bounds on its size; names that stand there twice, and patterns whose
    matching does not end, count as unreadable.

    ## Why is this bad?
    PEFT raises, or reads something else than was written.

    ## Example
    ```python
    path = adapter()
    cut(path, "adapter_config.json", by=20)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://www.rfc-editor.org/rfc/rfc8259
    """
    for fault in facts.faults:
        if fault.file == CONFIG:
            yield Violation(
                where=f"{CONFIG} in {facts.name}",
                observed=fault.observed,
                expected="one JSON object with the fields of a LoraConfig",
                fix=_FIXES.get(fault.kind, "save the adapter again, or copy or download the file again"),
            )


_FIXES = {
    "pattern": "write plain names instead of the pattern",
    "pointer": "run `git lfs pull`, or download the file itself",
}
