from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA117", severity="warning", needs=ConfigFacts)
def biases_of_the_base_are_trained(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """bias='all' trains the base model's own biases.

    ## What it does
    Looks for `bias="all"` (and mentions `bias="lora_only"`) on a base that has biases.

    ## Why is this bad?
    The biases belong to the base, not to the adapter: switching the adapter off no longer gives the
    base back, and only one adapter of a model can have them.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    report = check_config(config, gpt2_base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    report = check_config(config, gpt2_base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/741
    - https://github.com/huggingface/peft/issues/3306
    """
    bias = facts.settings.bias
    if bias in ("all", "lora_only") and facts.base.has_biases:
        yield Violation(
            where=f"bias on {facts.base.architecture}",
            observed=f"bias={bias!r} trains biases of the base; with the adapter disabled they stay changed",
            expected="bias='none', unless the base is never needed again",
            fix=change("set", bias="none"),
            severity="warning" if bias == "all" else "info",
        )
