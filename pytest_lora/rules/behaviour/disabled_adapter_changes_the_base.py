from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import LawFacts
from pytest_lora.rules import Violation, rule


@rule("LORA931", severity="error", needs=LawFacts)
def disabled_adapter_changes_the_base(facts: LawFacts, expect: Expect) -> Iterator[Violation]:
    """A model with its adapters disabled is not the base.

    ## What it does
    Disables the adapters of a copy, and compares its output bit for bit with that of the base underneath.

    ## Why is this bad?
    Preference tuning takes the model without its adapter as the reference. A reference that is not the base
    moves the loss and every reward.

    ## Example
    ```python
    from unittest.mock import patch

    from peft.tuners.lora import Linear

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    forward = Linear.forward


    def changed(layer, x, *args, **kwargs):
        return forward(layer, x, *args, **kwargs) + 0.5


    with patch.object(Linear, "forward", changed):
        report = check_lora_laws(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    report = check_lora_laws(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.disable_adapter
    """
    if facts.disabled is not None:
        yield Violation(
            where="the output with adapters disabled",
            observed=f"it differs by up to {facts.disabled:.3g} from that of the base",
            expected="the base, bit for bit",
            fix="look for base weights that were changed while the adapter was on them, and for hooks",
        )
