from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import MergeFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA917", severity="error", needs=MergeFacts)
def unmerge_does_not_restore_the_base(facts: MergeFacts, expect: Expect) -> Iterator[Violation]:
    """The base is not what it was after a merge and an unmerge.

    ## What it does
    Compares every tensor before the merge with that after the unmerge, to a few steps of rounding at the
    largest merged value. Quantized bases, which are rounded by every merge, are left out.

    ## Why is this bad?
    Training that goes on after an evaluation with merged weights goes on from another base.

    ## Example
    ```python
    from unittest.mock import patch

    from peft.tuners.lora import Linear

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    with patch.object(Linear, "unmerge", lambda self: self.merged_adapters.clear()):
        report = check_merge(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    report = check_merge(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraModel.unmerge_adapter
    """
    if facts.damaged:
        yield Violation(
            where=grouped(facts.damaged),
            observed=f"{len(facts.damaged)} tensors are not what they were after merge and unmerge",
            expected=f"the same weights, to {facts.restored_steps} steps of rounding",
            fix="keep a copy of the base for training on, or merge into a copy",
        )
