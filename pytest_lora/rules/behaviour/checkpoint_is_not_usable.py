from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.saved_config import ResumptionFacts
from pytest_lora.rules import Violation, rule


@rule("LORA925", severity="error", needs=ResumptionFacts)
def checkpoint_is_not_usable(facts: ResumptionFacts, expect: Expect) -> Iterator[Violation]:
    """There is no LoRA adapter that could be resumed.

    ## What it does
    Looks whether the folder holds a configuration and weights that can be read.

    ## Why is this bad?
    There is nothing to go on from.

    ## Example
    ```python
    path = adapter()
    cut(path)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_resume(path, config)
    ```

    ## Use instead
    ```python
    path = adapter()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_resume(path, config)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.unusable is not None:
        yield Violation(
            where=facts.name,
            observed=facts.unusable,
            expected="a LoRA adapter that can be loaded",
            fix="check_checkpoint says what is wrong with it, or which tool reads it; else start fresh",
        )
