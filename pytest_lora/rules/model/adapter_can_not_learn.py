from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import START_ANEW


@rule("LORA224", severity="error", needs=ModelFacts)
def adapter_can_not_learn(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter is at zero in a way that no gradient can leave.

    ## What it does
    The gradient of each factor is a product with the other one. Looks for modules where every trainable
    factor meets a factor of zeros.

    ## Why is this bad?
    If both factors are zero, both gradients are zero for ever. If lora_B is frozen at zero, lora_A trains
    without any effect. LoRA-FA, which freezes lora_A at random and trains lora_B, is fine.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://arxiv.org/abs/2106.09685
    - https://arxiv.org/abs/2308.03303
    """
    if expect.purpose != "train":
        return
    stuck = [layer for layer in facts.active_layers if layer.trainable and not layer.can_learn]
    if stuck:
        first = stuck[0]
        both = first.a.zero and first.b.zero
        frozen = first.a if first.b.trainable and not both else first.b
        state = "both factors are all zero" if both else f"{frozen.name} is frozen at zero"
        yield Violation(
            where=grouped(layer.module for layer in stuck),
            observed=f"{state} in {len(stuck)} of {len(facts.active_layers)} modules, so that every "
            "gradient is zero",
            expected="one factor at random, and the one at zero trainable",
            fix=START_ANEW.format(active=first.adapter)
            if both
            else f"make {frozen.name} trainable again: model.set_adapter({first.adapter!r})",
        )
