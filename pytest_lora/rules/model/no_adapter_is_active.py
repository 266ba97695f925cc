from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA215", severity="error", needs=ModelFacts)
def no_adapter_is_active(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """No adapter is active or left in the LoRA layers.

    ## What it does
    Looks for an active adapter in any LoRA layer.

    ## Why is this bad?
    The layers are still there but run the base weight alone: nothing is trained, evaluated or saved but the
    base. An adapter may have been deleted, or the active one never chosen; or `unload()` or
    `merge_and_unload()` took the layers off, which both do to the model itself.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    model.delete_adapter("default")
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.delete_adapter("default")
    model.set_adapter("second")
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.delete_adapter
    """
    if not facts.base.carries_adapter:
        yield Violation(
            where=facts.base.architecture or "the model",
            observed="a PEFT model without any LoRA layer: the adapter was unloaded, or merged and unloaded",
            expected="one active adapter",
            fix="go on with what merge_and_unload() returned, as a plain model; to train on, load the base and the "
            "adapter anew",
        )
    elif not facts.active:
        known = ", ".join(map(repr, facts.adapters))
        yield Violation(
            where=grouped(dict.fromkeys(layer.module for layer in facts.layers))
            if facts.layers
            else "all LoRA layers",
            observed=f"none of the adapters {known} is active"
            if known
            else "the LoRA layers hold no adapter any more",
            expected="one active adapter",
            fix=f"call model.set_adapter({facts.adapters[0]!r})"
            if known
            else "load an adapter, or add one with model.add_adapter('default', config) and "
            "model.set_adapter('default')",
        )
