from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA415", severity="info", needs=CheckpointFacts)
def adapter_is_of_another_method(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is none of PEFT's LoRA, and was not judged.

    ## What it does
    Recognises other methods of PEFT by peft_type, and LoRA files of diffusers and kohya-ss by their keys.

    ## Why is this bad?
    It is not: their keys and shapes follow rules of their own, so that nothing is said about them. Damaged
    files and NaN are found in them as well.

    ## Example
    ```python
    path = adapter()
    configure(path, peft_type="LOHA")
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_types
    - https://huggingface.co/docs/diffusers/using-diffusers/other-formats
    """
    if facts.other_method:
        yield Violation(
            where=facts.name,
            observed=f"{facts.other_method}: keys and shapes were not judged",
            expected="an adapter of peft_type LORA",
            fix="nothing, if this is what it should be",
        )
