from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import LawFacts
from pytest_lora.rules import Violation, rule


@rule("LORA930", severity="error", needs=LawFacts)
def zeroed_adapter_changes_the_output(facts: LawFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter whose `lora_B` is zero changes the output.

    ## What it does
    Sets `lora_B` of a copy to zero, and compares its output with that of the disabled adapter. DoRA, whose
    magnitude acts alone, is left out.

    ## Why is this bad?
    A fresh adapter starts training from the base. One that adds something else starts from elsewhere.

    ## Example
    ```python
    from unittest.mock import patch

    from peft.tuners.lora import Linear

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    forward = Linear.forward


    def changed(layer, x, *args, **kwargs):
        out = forward(layer, x, *args, **kwargs)
        return out if layer.disable_adapters else out + layer.scaling["default"] / 2


    with patch.object(Linear, "forward", changed):
        report = check_lora_laws(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    report = check_lora_laws(model, batch)
    ```

    ## References
    - Section 4.1: https://arxiv.org/abs/2106.09685
    """
    if facts.zeroed is not None:
        yield Violation(
            where="the output with lora_B = 0",
            observed=f"it differs by up to {facts.zeroed:.3g} from that with the adapter disabled",
            expected="no difference: B @ A is zero",
            fix="look for biases of the adapter (lora_bias) or a forward of its own that add to the output",
        )
