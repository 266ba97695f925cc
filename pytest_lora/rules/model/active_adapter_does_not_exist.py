from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA265", severity="error", needs=ModelFacts)
def active_adapter_does_not_exist(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The PEFT model calls an adapter active that it does not have, or none while its layers apply one.

    ## What it does
    Compares the name that the PEFT model keeps as its active adapter with its configurations and its layers.

    ## Why is this bad?
    `base_model.delete_adapter` deletes below the PEFT model, which goes on to call the deleted adapter active: the
    forward pass of a model for a task looks its configuration up and raises `KeyError`. Where none is called active,
    layers still apply an adapter, and what asks the model which one is told none (a warning).

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.base_model.delete_adapter("default")
    model.base_model.set_adapter("second")
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
    - https://github.com/huggingface/peft/issues/3512
    """
    if facts.active_elsewhere is None or not facts.adapters:
        return
    applied = facts.active or facts.adapters
    told = ", ".join(map(repr, facts.active_elsewhere))
    yield Violation(
        where="active_adapter of the PEFT model",
        observed=f"the model calls adapter {told} active, which it does not have: it was deleted below the PEFT model; "
        f"its layers hold {', '.join(map(repr, facts.adapters))}"
        if told
        else f"the model calls no adapter active, but its layers apply {', '.join(map(repr, applied))}",
        expected="the adapters that the layers apply",
        fix=f"call model.set_adapter({applied[0]!r}) on the PEFT model, whose own delete_adapter keeps the two in step",
        severity=None if told else "warning",
    )
