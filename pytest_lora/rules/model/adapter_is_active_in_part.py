from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA235", severity="error", needs=ModelFacts)
def adapter_is_active_in_part(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter is active in some of its layers only.

    ## What it does
    Compares the layers of each adapter: active in all of them, or in none.

    ## Why is this bad?
    The model is a mixture of adapters, or of adapter and base, that no saved file describes. It happens
    when an adapter is switched on single layers instead of on the model.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.base_model.model.model.layers[1].self_attn.q_proj.set_adapter("second")
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#check-layer-and-model-status
    """
    for adapter in facts.active:
        layers = facts.of(adapter)
        off = [layer for layer in layers if not layer.active]
        if off:
            yield Violation(
                where=grouped(layer.module for layer in off),
                observed=f"adapter {adapter!r} is active in {len(layers) - len(off)} of its {len(layers)} "
                "layers",
                expected="an adapter to be active in all of its layers or in none",
                fix=f"call model.set_adapter({adapter!r}) on the PEFT model, not on single layers",
            )
