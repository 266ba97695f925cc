from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import optimizer_anew


@rule("LORA302", severity="error", needs=OptimizerFacts)
def optimizer_is_of_another_model(facts: OptimizerFacts, expect: Expect) -> Iterator[Violation]:
    """The optimizer holds the adapter of another model.

    ## What it does
    Looks for an optimizer that holds no low-rank factor of this model but parameters which the model does
    not have.

    ## Why is this bad?
    An optimizer keeps the tensors it was made with. After the model was built anew (the next trial of a
    sweep, a notebook cell run twice) it goes on changing the adapter of the old one, and the new one
    never moves.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model = get_peft_model(model.unload(), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model.unload(), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/859
    """
    if facts.stale and expect.purpose == "train":
        yield Violation(
            where=f"optimizer ({facts.optimizer})",
            observed=f"{facts.foreign} of its parameters do not belong to this model, and none of this model's "
            "trainable adapter tensors is in it: the optimizer is stale",
            expected="an optimizer made from the parameters of this model",
            fix="make the optimizer anew whenever the model or its adapter is made anew: "
            + optimizer_anew(facts.groups[0].lr),
        )
