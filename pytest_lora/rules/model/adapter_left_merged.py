from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA203", severity="error", needs=ModelFacts, passing=True)
def adapter_left_merged(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter is merged into the base weights while it should train.

    ## What it does
    Looks for layers whose adapter is merged into the base weight, unless the model is for inference.

    ## Why is this bad?
    A merged layer runs the base weight alone: its adapter is outside the forward pass, gets no gradient,
    and does not learn. Saved as it stands, the base weights hold the update twice.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.merge_adapter()
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.merge_adapter()
    model.unmerge_adapter()
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraModel.merge_adapter
    """
    merged = [layer for layer in facts.layers if layer.merged]
    if merged and expect.purpose == "train":
        yield Violation(
            where=grouped(layer.module for layer in merged),
            observed=f"adapter {merged[0].adapter!r} is merged into the base weights",
            expected="adapters apart from the base weights while they train",
            fix="call model.unmerge_adapter() before training",
        )
