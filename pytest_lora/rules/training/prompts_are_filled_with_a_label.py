from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA366", severity="warning", needs=TrainingFacts)
def prompts_are_filled_with_a_label(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """One token stands in the labels where -100 is meant.

    ## What it does
    Looks, in the labels of a causal model, for one and the same token at many places where the input has others,
    while nearly all other labels equal the input at their place. Labels that are one token everywhere, and labels
    for a loss of one's own, are no finding.

    ## Why is this bad?
    Only -100 is left out of the loss. With the pad token, 0 or the end token there, the model is taught to answer
    every token of a prompt with it. The loss looks lovely, as that is learned at once, and the tuned model writes
    nothing but that token.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"][:, :8] = 0
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"][:, :8] = -100
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/tasks/language_modeling
    """
    if facts.custom_loss:
        return
    filled = [
        known
        for known in facts.labels
        if known.labels >= ENOUGH
        and known.bounds.filled >= FILLED
        and known.same >= FILLED
        and known.bounds.filled + known.same >= ALL_BUT_FEW
    ]
    if filled and 2 * len(filled) > len(facts.labels):
        first = filled[0]
        yield Violation(
            where=f"{named_batches(filled)}: labels",
            observed=f"{100 * first.bounds.filled:.0f} % of the labels are the one token {first.bounds.filler}, where "
            "input_ids have others: it counts as a target, as only -100 is ignored",
            expected="labels of -100 over prompts and padding",
            fix=f"put -100 where the labels are {first.bounds.filler} and the input is not: batch['labels'][(batch"
            f"['labels'] == {first.bounds.filler}) & (batch['labels'] != batch['input_ids'])] = -100",
        )


ENOUGH, FILLED, ALL_BUT_FEW = 8, 0.1, 0.95
"""Labels that a verdict needs; the share that one token and that the text must have at least; and both together."""
