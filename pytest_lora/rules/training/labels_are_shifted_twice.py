from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA324", severity="error", needs=TrainingFacts)
def labels_are_shifted_twice(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Labels are shifted already, and the model shifts them again.

    ## What it does
    Compares labels with input ids: causal models of transformers shift labels themselves, so that a label
    equals the input at its own position. Labels that equal the next input throughout are shifted twice.

    ## Why is this bad?
    The model is then trained to predict the token after the next one. The loss falls, to a worse value,
    and generated text skips every other token.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["input_ids"].roll(-1, dims=1)
    batch["labels"][:, -1] = -100
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["input_ids"].clone()
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/tasks/language_modeling
    """
    shifted = [
        known
        for known in facts.labels
        if known.kind == "causal" and known.labels >= ENOUGH and known.ahead >= ALIKE and known.same < UNLIKE
    ]
    if shifted and not facts.custom_loss:
        yield Violation(
            where=f"batches {', '.join(str(known.batch) for known in shifted[:8])}: labels",
            observed=f"{100 * shifted[0].ahead:.0f} % of the labels equal the next input token, "
            f"{100 * shifted[0].same:.0f} % the one at their own position: they are shifted already, and the model "
            "shifts them once more",
            expected="labels[t] == input_ids[t]; the model shifts them",
            fix="set labels = input_ids.clone(), with -100 where nothing is to be learned",
        )


ENOUGH, ALIKE, UNLIKE = 4, 0.9, 0.5
"""Labels that a verdict needs, and shares: a text of one repeated token is alike in both ways."""
