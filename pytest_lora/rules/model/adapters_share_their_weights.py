from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA257", severity="error", needs=ModelFacts)
def adapters_share_their_weights(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Two adapters are one: their factors are the same tensors.

    ## What it does
    For training: looks for pairs of adapters that share both factors in memory on every module that both are on, where
    one of them trains. A shared `lora_A` alone is a choice.

    ## Why is this bad?
    Training one trains the other. A reference for preferences moves with the policy, so that margins stay zero and the
    loss stays at ln(2); a copy of the adapter as it was is none.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    model.add_adapter("reference", config)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["reference"].weight = module.lora_A["default"].weight
            module.lora_B["reference"].weight = module.lora_B["default"].weight
    report = check_model(model)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    model.add_adapter("reference", config)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["reference"].weight.data.copy_(module.lora_A["default"].weight)
            module.lora_B["reference"].weight.data.copy_(module.lora_B["default"].weight)
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/trl/pull/1193
    """
    training = facts.training_adapters
    for first, second in facts.shared if expect.purpose == "train" else ():
        if first in training or second in training:
            yield Violation(
                where=f"{first}, {second}",
                observed=f"the factors of {first!r} and {second!r} are the same tensors: what trains one changes both",
                expected="tensors of its own for each adapter",
                fix="copy the numbers, not the tensors: own.weight.data.copy_(other.weight.data)",
            )
