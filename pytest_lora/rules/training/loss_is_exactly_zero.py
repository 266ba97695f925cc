from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA311", severity="error", needs=TrainingFacts)
def loss_is_exactly_zero(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The loss is exactly zero and gives no gradient.

    ## What it does
    Looks for steps whose loss is 0.0 and whose gradients are all zero. A loss that starts at zero but has
    a gradient (that of policy-gradient methods) is not meant, nor one that is merely small.

    ## Why is this bad?
    A model that has learned its data has a small loss, never exactly zero. Zero comes from labels that
    select nothing, a weight of zero, or a NaN that something replaced.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, loss_fn=lambda model, batch: model(**batch).loss * 0)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, loss_fn=lambda model, batch: model(**batch).loss)
    ```

    ## References
    - https://github.com/hiyouga/LlamaFactory/issues/7263
    """
    if facts.loss_is_zero and not facts.labels_ignored:
        yield Violation(
            where="the loss",
            observed=f"the loss is exactly 0 at all {len(facts.steps)} steps, and no gradient is left",
            expected="a loss above 0 that depends on the adapter",
            fix="look at what the loss selects and multiplies: labels, weights, masks",
        )
