from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.saved_config import ResumptionFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import START_FRESH


@rule("LORA924", severity="error", needs=ResumptionFacts)
def structure_differs_from_checkpoint(facts: ResumptionFacts, expect: Expect) -> Iterator[Violation]:
    """A field that decides which tensors there are, or how they are scaled, is not that of the checkpoint.

    ## What it does
    Compares rsLoRA, DoRA, biases, `modules_to_save`, token rows and layers of the configuration with those of
    the checkpoint.

    ## Why is this bad?
    A part of the checkpoint is dropped, starts from nothing, or is scaled by another factor.

    ## Example
    ```python
    path = adapter()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_rslora=True)
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
    for change in facts.fields:
        yield Violation(
            where=facts.where,
            observed=f"{change.field} is {change.now} in the configuration and {change.before} in the checkpoint",
            expected=f"the same {change.field}",
            fix=f"{change.field}={change.before}, as in the checkpoint; or {START_FRESH}",
        )
