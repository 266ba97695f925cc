from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA413", severity="error", needs=CheckpointFacts)
def config_field_is_unusable(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """A field of adapter_config.json holds what LoRA cannot use.

    ## What it does
    Looks at the fields of LoraConfig: whether each holds what its kind asks for, that the rank is above 0,
    and that alpha is not 0.

    ## Why is this bad?
    PEFT raises while loading, or builds something else; with alpha at 0 the adapter does nothing.

    ## Example
    ```python
    path = adapter(lora_alpha=16)
    configure(path, lora_alpha=0)
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
    seen = None
    if facts.config.problem and not any(f.kind == "pattern" for f in facts.faults):
        seen = facts.config.problem
    elif facts.settings is not None and facts.settings.lora_alpha == 0 and facts.fit is None:
        seen = "lora_alpha is 0, so that the scaling is zero and the adapter does nothing"
    if seen:
        yield Violation(
            where=f"{CONFIG} in {facts.name}",
            observed=seen,
            expected="the values that the adapter was trained with",
            fix="restore the field from the configuration of the training",
        )
