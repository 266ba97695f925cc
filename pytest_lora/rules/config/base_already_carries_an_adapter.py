from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA125", severity="error", needs=ConfigFacts)
def base_already_carries_an_adapter(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The base that the configuration is for already went through PEFT.

    ## What it does
    Looks for PEFT layers in the base, and lets PEFT say whether it takes the configuration as one more adapter.

    ## Why is this bad?
    A second `get_peft_model` wraps the first adapter inside the second. Keys of saved files no longer
    fit, and what is loaded seems to do nothing.

    ## Example
    ```python
    base = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    base = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    base = base.unload()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2115
    """
    if facts.base.carries_adapter and not facts.live:
        refusal = facts.refusal
        words = f"{refusal.error}: {refusal.message[:200]}" if refusal is not None and refusal.error else ""
        yield Violation(
            where=facts.base.architecture,
            observed="the base already carries PEFT layers: a second adapter would be wrapped around the first"
            + (f"; beside it PEFT refuses this one: {words}" if words else ""),
            expected="a base without adapters",
            fix="take the first adapter off: base = base.unload()"
            + (
                "" if words else "; for a second adapter beside it call add_adapter instead of get_peft_model"
            ),
        )
