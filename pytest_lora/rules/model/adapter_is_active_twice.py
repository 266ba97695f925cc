from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA236", severity="warning", needs=ModelFacts)
def adapter_is_active_twice(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """One adapter is active under two names, so that its update counts twice.

    ## What it does
    Compares the numbers of adapters that are active together. Pairs that are equal on every module that both adapt,
    and change anything, are the same adapter.

    ## Why is this bad?
    The forward pass adds the updates of all active adapters. The same file loaded under two names acts with twice
    the scaling that it was trained with.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("again", config)
    trained = {name: p for name, p in model.named_parameters() if ".default." in name}
    model.load_state_dict({name.replace(".default.", ".again."): p for name, p in trained.items()}, strict=False)
    model.base_model.set_adapter(["default", "again"])
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## References
    - https://github.com/sgl-project/sglang/issues/13771
    - https://huggingface.co/docs/peft/developer_guides/mixed_models
    """
    for first, second in facts.duplicates:
        layers = [layer for layer in facts.of(first) if layer.active and layer.changes_output]
        if layers:
            yield Violation(
                where=grouped(layer.module for layer in layers),
                observed=f"adapters {first!r} and {second!r} are active together and identical: the same update counts "
                "twice",
                expected="every adapter active once",
                fix=f"call model.set_adapter({first!r}); for a stronger effect choose the scaling by lora_alpha",
            )
