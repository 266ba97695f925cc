from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA407", severity="info", needs=CheckpointFacts)
def values_are_not_read(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The file is so large that not all of its values were read.

    ## What it does
    Reads the values of at most 2 GiB of tensors, LoRA factors first, and says what was left out.

    ## Why is this bad?
    NaN or zeros in the rest would not be seen.

    ## Example
    ```python
    path = adapter()
    write_sparse(path, gigabytes=3)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/safetensors#format
    """
    if facts.unread:
        yield Violation(
            where=f"{facts.weights} in {facts.name}",
            observed=f"the values of {facts.unread / 2**30:.1f} GiB of tensors were not read",
            expected="an adapter of at most 2 GiB",
            fix="nothing, if the size is meant; else save the adapter alone, not the model with it",
        )
