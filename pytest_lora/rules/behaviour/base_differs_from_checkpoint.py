from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.saved_config import ResumptionFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import START_FRESH


@rule("LORA923", severity="error", needs=ResumptionFacts)
def base_differs_from_checkpoint(facts: ResumptionFacts, expect: Expect) -> Iterator[Violation]:
    """The base of the run that is to go on is not that of the checkpoint.

    ## What it does
    Compares `base_model_name_or_path` of the configuration with that of the checkpoint, where both are set.

    ## Why is this bad?
    An adapter is a difference to one base. On another one it means something else.

    ## Example
    ```python
    path = adapter()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    config.base_model_name_or_path = "org/other-llama"
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
    if facts.base is not None:
        now, before = facts.base
        yield Violation(
            where=facts.where,
            observed=f"the configuration is for the base {now!r}, the checkpoint was trained on {before!r}",
            expected="the base of the checkpoint",
            fix=f"load {before!r} and set config.base_model_name_or_path = {before!r}; or {START_FRESH}",
        )
