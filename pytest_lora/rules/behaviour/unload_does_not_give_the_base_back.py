from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import MergeFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA918", severity="error", needs=MergeFacts)
def unload_does_not_give_the_base_back(facts: MergeFacts, expect: Expect) -> Iterator[Violation]:
    """The base is not what it was after `unload()`.

    ## What it does
    Compares what PEFT's `unload()` leaves with the base as it lies under the adapter. Trained copies of whole
    modules, which PEFT leaves in place by design, are left out.

    ## Why is this bad?
    Whoever unloads one adapter to put on another starts from a base that nobody knows.

    ## Example
    ```python
    from unittest.mock import patch

    from peft.tuners.lora import LoraModel

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"]))
    unload = LoraModel.unload


    def damaging(self):
        found = unload(self)
        found.model.norm.weight.data += 1
        return found


    with patch.object(LoraModel, "unload", damaging):
        report = check_merge(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"]))
    report = check_merge(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraModel.unload
    """
    if facts.left_over:
        yield Violation(
            where=grouped(facts.left_over),
            observed=f"{len(facts.left_over)} tensors differ from those of the base after unload()",
            expected="the base as it was before the adapter",
            fix="load the base anew instead of unloading the adapter",
        )
