from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA216", severity="info", needs=ModelFacts)
def inactive_adapter_is_trainable(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An inactive adapter requires gradients beside the active one that trains.

    ## What it does
    Looks for adapters outside the forward pass that still require gradients.

    ## Why is this bad?
    It gets no gradient, but an optimizer built from all trainable parameters holds it: weight decay shrinks
    it, and the count of trainable parameters is too high.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("reference", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if ".reference." in name:
            parameter.requires_grad_(True)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("reference", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.set_adapter
    """
    training = facts.training_adapters
    if expect.purpose != "train" or not set(training) & set(facts.active):
        return
    one_with_another = {name for pair in facts.shared for name in pair}
    for adapter in [name for name in training if name not in (*facts.active, *one_with_another)]:
        numbers = sum(layer.parameters for layer in facts.of(adapter))
        yield Violation(
            where=grouped(layer.module for layer in facts.of(adapter)),
            observed=f"adapter {adapter!r} is inactive but trainable ({numbers:,} numbers)",
            expected=f"gradients only for the active adapter {facts.active[0]!r}",
            fix=f"call model.set_adapter({facts.active[0]!r}), which freezes the others",
        )
