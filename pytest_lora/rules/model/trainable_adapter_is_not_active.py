from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA214", severity="error", needs=ModelFacts)
def trainable_adapter_is_not_active(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter that trains is not active, and the active one is frozen.

    ## What it does
    Compares which adapters are in the forward pass with which require gradients.

    ## Why is this bad?
    The trainable adapter is outside the forward pass and gets no gradient; its weights never change, though
    the count of trainable parameters looks right. `load_adapter(..., is_trainable=True)` does not activate
    what it loads.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("ft", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(".ft." in name)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("ft", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("ft")
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/3580
    - https://github.com/huggingface/peft/issues/2759
    """
    training = facts.training_adapters
    if expect.purpose != "train" or not training or not facts.active or set(training) & set(facts.active):
        return
    yield Violation(
        where=grouped(layer.module for layer in facts.layers if layer.adapter in training),
        observed=f"adapter {training[0]!r} is trainable but not active; the active adapter "
        f"{facts.active[0]!r} is frozen",
        expected="the adapter that trains to be the active one",
        fix=f"call model.set_adapter({training[0]!r}) before training",
    )
