from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.saved_config import ResumptionFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import as_in_checkpoint


@rule("LORA922", severity="error", needs=ResumptionFacts)
def alpha_differs_from_checkpoint(facts: ResumptionFacts, expect: Expect) -> Iterator[Violation]:
    """The alpha of the run that is to go on is not that of the checkpoint.

    ## What it does
    Compares the alpha that the configuration gives each module with that of the checkpoint.

    ## Why is this bad?
    What was learned is scaled by another factor from the first step on.

    ## Example
    ```python
    path = adapter()
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
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
    if facts.alpha is not None:
        module, now, before = facts.alpha
        yield Violation(
            where=facts.where,
            observed=f"the configuration has lora_alpha={now:g}, the checkpoint {before:g}, as for {module}: "
            "what was learned would be scaled by another factor",
            expected="the alpha of the checkpoint",
            fix=as_in_checkpoint(facts, "lora_alpha", "alpha_pattern"),
        )
