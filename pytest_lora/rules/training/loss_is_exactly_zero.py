from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA311", severity="error", needs=TrainingFacts, because_of=("reference_moves_along",))
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
            observed=f"the loss is exactly 0 at all {len(facts.steps)} steps, and no gradient is left"
            + (f": {' and '.join(facts.blank)} is 0 throughout" if facts.blank else ""),
            expected="a loss above 0 that depends on the adapter",
            fix=_looked_at(facts),
        )


def _looked_at(facts: TrainingFacts) -> str:
    if any("advantage" in name for name in facts.blank):
        return (
            "look at the rewards: where all answers to a question get the same, their advantages are 0; raise the "
            "number of answers or the temperature, or give rewards that tell answers apart"
        )
    if facts.blank:
        return f"look at what makes {' and '.join(facts.blank)}: an answer that was cut off has nothing left to count"
    if facts.custom_loss and facts.rows == 1:
        return (
            "look at what the loss selects and multiplies; one that compares a row with the others of its batch needs "
            "two rows at least"
        )
    return "look at what the loss selects and multiplies: labels, weights, masks"
