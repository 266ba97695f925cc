from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import MergeFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA919", severity="error", needs=MergeFacts)
def adapter_cannot_be_merged(facts: MergeFacts, expect: Expect) -> Iterator[Violation]:
    """PEFT refuses to merge the adapter.

    ## What it does
    Merges the adapters of a copy, and reports what PEFT raises.

    ## Why is this bad?
    A deployment that needs merged weights fails when the training is paid for.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], lora_bias=True))
    report = check_merge(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"]))
    report = check_merge(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.lora_bias
    """
    if facts.refusal is not None:
        yield Violation(
            where=grouped(facts.unmerged),
            observed=f"PEFT refuses to merge: {facts.refusal}",
            expected="an adapter that can be merged",
            fix="keep the adapter apart, or train one without the variant that the message names",
        )
