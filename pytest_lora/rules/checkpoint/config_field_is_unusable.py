from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA413", severity="error", needs=CheckpointFacts)
def config_field_is_unusable(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """A field of adapter_config.json holds what LoRA cannot use.

    ## What it does
    Looks at the fields of LoraConfig: whether each holds what its kind asks for, and that the rank is above 0.

    ## Why is this bad?
    PEFT raises while loading, or builds something else.

    ## Example
    ```python
    path = adapter()
    configure(path, r=0)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig
    """
    if facts.config is None:
        return
    if facts.config.problem and not any(f.kind == "pattern" for f in facts.faults):
        yield Violation(
            where=f"{CONFIG} in {facts.name}",
            observed=facts.config.problem,
            expected="the values that the adapter was trained with",
            fix="restore the field from the configuration of the training",
        )
