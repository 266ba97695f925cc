from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA414", severity="warning", needs=CheckpointFacts)
def config_lacks_fields(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """adapter_config.json is silent about rank, alpha or method.

    ## What it does
    Looks for r, lora_alpha and peft_type.

    ## Why is this bad?
    Where r or lora_alpha is missing PEFT takes 8, whatever the adapter was trained with: the scaling is
    another one, without a word. Without peft_type it does not load.

    ## Example
    ```python
    path = adapter()
    configure(path, lora_alpha=None)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig
    """
    if facts.config is None or facts.other_method:
        return
    lacking = [name for name in ("r", "lora_alpha", "peft_type") if name not in facts.config.fields]
    for name in lacking:
        method = name == "peft_type"
        yield Violation(
            where=f"{CONFIG} in {facts.name}",
            observed=f"{name} is missing" + ("" if method else "; PEFT takes its default, 8"),
            expected=f"{name} as it was in training",
            fix="add peft_type='LORA'" if method else f"add {name} with the value of the training",
            severity="error" if method else None,
        )
