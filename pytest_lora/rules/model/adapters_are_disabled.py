from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA202", severity="error", needs=ModelFacts, passing=True)
def adapters_are_disabled(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Adapters are switched off, so that the forward pass is that of the base alone.

    ## What it does
    Looks for layers whose adapters are disabled.

    ## Why is this bad?
    A disabled layer runs its base weight only: no gradient reaches the adapter, and an evaluation measures
    the base. It is what `disable_adapter_layers()` or `disable_adapters()` leaves behind when nobody
    enables the adapters again, for instance after reference logits were computed.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.base_model.disable_adapter_layers()
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with model.disable_adapter():
        pass
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.disable_adapter
    - https://github.com/huggingface/peft/issues/2802
    """
    off = [layer for layer in facts.layers if layer.disabled]
    if off:
        yield Violation(
            where=grouped(dict.fromkeys(layer.module for layer in off)),
            observed=f"adapters are disabled in {len(off)} of {len(facts.layers)} LoRA layers; no gradient "
            "can reach them",
            expected="adapters enabled, and switched off only inside `with model.disable_adapter():`",
            fix="call model.base_model.enable_adapter_layers()"
            if facts.nested
            else "call model.enable_adapters()",
            severity="warning" if expect.purpose == "inference" else None,
        )
