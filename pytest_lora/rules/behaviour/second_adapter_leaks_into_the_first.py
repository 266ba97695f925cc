from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import LawFacts
from pytest_lora.rules import Violation, rule


@rule("LORA934", severity="error", needs=LawFacts)
def second_adapter_leaks_into_the_first(facts: LawFacts, expect: Expect) -> Iterator[Violation]:
    """A second adapter that is not active changes the output of the first.

    ## What it does
    Adds a second adapter to a copy, makes it active and then the first again, and compares the output of the
    first.

    ## Why is this bad?
    Adapters that are served or trained side by side change each other.

    ## Example
    ```python
    from unittest.mock import patch

    from peft.tuners.lora import Linear

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    update_layer = Linear.update_layer


    def changed(layer, *args, **kwargs):
        update_layer(layer, *args, **kwargs)
        if len(layer.lora_A) > 1:
            layer.base_layer.weight.data += 1e-2


    with patch.object(Linear, "update_layer", changed):
        report = check_lora_laws(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    report = check_lora_laws(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.add_adapter
    """
    if facts.leak is not None:
        yield Violation(
            where=f"the output under {', '.join(facts.leak.adapters)}",
            observed=f"it differs by up to {facts.leak.apart:.3g} {facts.leak.when}",
            expected="the same output, bit for bit",
            fix="look for state that adapters share: base weights, biases, buffers, hooks",
        )
