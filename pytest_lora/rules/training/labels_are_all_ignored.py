from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA320", severity="error", needs=TrainingFacts)
def labels_are_all_ignored(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Every label of a batch is -100: nothing is left to learn from.

    ## What it does
    Counts the labels that are not -100 in each batch; for causal models after their shift, so that a
    label at the first position does not count. A masked prompt is no finding. So are `chosen_labels`,
    `rejected_labels` and TRL's `completion_mask`, row by row.

    ## Why is this bad?
    The mean over no label is NaN, or zero where the trainer divides by a given number. It comes from a
    prompt that fills the whole window so that the answer is cut off, or from a template that a collator
    does not find.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"][:, :8] = -100
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/trl/sft_trainer#train-on-completion-only
    """
    empty = [known for known in facts.labels if known.labels == 0 and known.total]
    rows = sum(known.rows for known in facts.labels)
    ignored = sum(known.rows_ignored for known in facts.labels)
    if empty:
        yield Violation(
            where=f"{named_batches(empty)}: labels",
            observed=f"all labels are -100 in {len(empty)} of {len(facts.labels)} batches: the loss is the mean "
            "over nothing",
            expected="labels other than -100 in every batch",
            fix="look at the masking of prompts: is the response template found, and does the answer fit the "
            "maximal length?",
            severity="error" if 2 * len(empty) >= len(facts.labels) else "warning",
        )
    elif rows > 1 and ignored >= SHARE * rows:
        yield Violation(
            where="labels",
            observed=f"all labels are -100 in {ignored} of {rows} rows",
            expected="something to learn in most rows",
            fix="raise the maximal length so that answers are not cut off, or drop such rows",
            severity="warning",
        )
    for named in dict.fromkeys(known.named for known in facts.answers):
        of_name = [known for known in facts.answers if known.named == named]
        rows, empty_rows = sum(known.rows for known in of_name), sum(known.empty for known in of_name)
        if rows > 1 and empty_rows >= SHARE * rows:
            yield Violation(
                where=named,
                observed=f"an answer has no token that counts in {empty_rows} of {rows} rows",
                expected="answers to compare in most rows",
                fix="raise the maximal length so that answers are not cut off, or drop such rows",
                severity="warning",
            )


SHARE = 0.25
"""Rows without a label from which on a batch is much smaller than it was meant to be: TRL drops such rows."""
