from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA217", severity="info", needs=ModelFacts)
def several_adapters_train_at_once(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Several adapters are active and trainable at the same time.

    ## What it does
    Counts the active adapters that train.

    ## Why is this bad?
    Their updates are added in one forward pass, so that none of them works alone as it did in training.
    That may be meant; saved and loaded one by one, each is a part of the whole.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
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
    - https://huggingface.co/docs/peft/developer_guides/mixed_models
    """
    by_module: dict[str, list[str]] = {}
    for layer in facts.layers:
        if layer.active and layer.trainable:
            by_module.setdefault(layer.module, []).append(layer.adapter)
    together = max(by_module.values(), key=len, default=[])
    if expect.purpose == "train" and len(together) > 1:
        yield Violation(
            where=", ".join(together),
            observed=f"{len(together)} adapters train together; the forward pass adds their updates",
            expected="one adapter trained at a time, unless their sum is meant",
            fix=f"call model.set_adapter({together[-1]!r}) to train one of them",
        )
