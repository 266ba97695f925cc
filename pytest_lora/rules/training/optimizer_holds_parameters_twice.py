from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import optimizer_anew


@rule("LORA318", severity="warning", needs=OptimizerFacts)
def optimizer_holds_parameters_twice(facts: OptimizerFacts, expect: Expect) -> Iterator[Violation]:
    """The optimizer holds the same parameters more than once.

    ## What it does
    Counts how often each trainable parameter is in the optimizer.

    ## Why is this bad?
    Every step then changes such a parameter twice: its learning rate is double, its weight decay too, and
    Adam's moments are wrong. torch only warns, where the two are in one group. It comes from two lists of
    parameters that overlap, such as those of the model and those of its adapter.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable + trainable, lr=1e-3)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    trainable = [p for p in model.parameters() if p.requires_grad]
    report = check_training(model, batch, optimizer=torch.optim.AdamW(trainable, lr=1e-3))
    ```

    ## References
    - https://github.com/pytorch/pytorch/issues/40967
    """
    if facts.doubled and expect.purpose == "train":
        yield Violation(
            where=f"optimizer ({facts.optimizer}), {grouped(facts.doubled)}",
            observed=f"{len(facts.doubled)} parameters are in the optimizer more than once (duplicates): every step "
            "changes them twice",
            expected="every trainable parameter once",
            fix=f"make the optimizer without a second list: {optimizer_anew(facts.groups[0].lr)}",
        )
