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
    Compares which adapters are in the forward pass with which require gradients, or were loaded to train.

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
    if expect.purpose != "train" or not facts.active:
        return
    training = [name for name in facts.training_adapters if name not in facts.active]
    meant = [
        c.adapter for c in facts.configs if not c.settings.inference_mode and c.adapter not in facts.active
    ]
    if training and set(facts.active).isdisjoint(facts.training_adapters):
        yield _violation(facts, training[0], f"frozen; {training[0]!r} is trainable")
    elif meant and facts.training_adapters and _loaded_for_inference(facts):
        yield _violation(
            facts, meant[0], f"trained though it was loaded for inference, and {meant[0]!r} is not"
        )


def _loaded_for_inference(facts: ModelFacts) -> bool:
    """Whether no active adapter was made or loaded in order to train."""
    active = [config for config in facts.configs if config.adapter in facts.active]
    return bool(active) and all(config.settings.inference_mode for config in active)


def _violation(facts: ModelFacts, adapter: str, state: str) -> Violation:
    return Violation(
        where=grouped(layer.module for layer in facts.of(adapter)),
        observed=f"adapter {adapter!r} is not active; the active adapter {facts.active[0]!r} is {state}",
        expected="the adapter that is to be trained as the active one",
        fix=f"call model.set_adapter({adapter!r}) before training",
    )
