from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA136", severity="error", needs=ConfigFacts, on_saved="with_base")
def merge_is_impossible(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is going to be merged, and PEFT cannot merge it.

    ## What it does
    Needs `Expect(will_merge=True)`. Lets PEFT merge small layers of the adapted kinds under this configuration and
    reports its error: convolutions in groups, `lora_bias` on a layer without a bias, Activated LoRA, layers that are
    quantized in a format without a merge.

    ## Why is this bad?
    `merge_and_unload` raises when the training is over and the adapter is to be delivered.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_bias=True)
    report = check_config(config, base, expect=Expect(will_merge=True))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base, expect=Expect(will_merge=True))
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/lora#merge-lora-weights-into-the-base-model
    """
    refusal = facts.merge_refusal
    if expect.will_merge and refusal is not None:
        yield Violation(
            where=f"LoraConfig on {facts.base.architecture}",
            observed=f"merging raises {refusal.error}: {' '.join(refusal.message.split())[:200]}",
            expected="an adapter that PEFT can merge",
            fix=next((fix for word, fix in _FIXES.items() if word in refusal.message), _FIXES[""]),
        )


_FIXES = {
    "groups": advise(
        "take the convolutions in groups out of target_modules, or load the adapter beside the base"
    ),
    "bias": advise(change("set", lora_bias=False), ", or adapt layers that have a bias"),
    "": advise(
        "load the adapter beside the base instead of merging it, or train plain LoRA on float weights"
    ),
}
"""What mends each refusal, found by a word of it; the first that fits."""
