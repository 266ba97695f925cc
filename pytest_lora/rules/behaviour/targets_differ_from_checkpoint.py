from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.saved_config import ResumptionFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import as_in_checkpoint


@rule("LORA921", severity="error", needs=ResumptionFacts)
def targets_differ_from_checkpoint(facts: ResumptionFacts, expect: Expect) -> Iterator[Violation]:
    """The run that is to go on adapts other modules than the checkpoint.

    ## What it does
    Compares the modules that the configuration adapts with those that the checkpoint holds: on the base where
    one is given, else by their names.

    ## Why is this bad?
    What the checkpoint holds for other modules is dropped, and modules that it does not hold start from
    nothing.

    ## Example
    ```python
    path = adapter()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj"])
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
    parts = (
        [f"the configuration does not adapt {grouped(facts.gone)} of the checkpoint"] if facts.gone else []
    )
    parts += [f"the checkpoint has no tensors for {grouped(facts.new)}"] if facts.new else []
    if parts:
        yield Violation(
            where=facts.where,
            observed=f"{' and '.join(parts)}; LoRA shapes are fixed at initialisation",
            expected="the modules of the checkpoint",
            fix=as_in_checkpoint(facts, "target_modules", "exclude_modules"),
        )
