from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA322", severity="warning", needs=TrainingFacts)
def end_token_is_never_a_target(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Sequences end with the end token, but it is never a label.

    ## What it does
    Looks for end tokens (`eos_token_id`) that close a text whose last token is a target, in batches that
    have no end token among their labels. Text without end tokens, such as packed text, is no finding.

    ## Why is this bad?
    The model is never taught to stop and rambles on. The usual cause: the pad token is the end token, and
    the collator sets every pad token to -100, the true end too.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.eos_token_id = 2
    batch["input_ids"][:, -1] = 2
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 2, -100)
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.eos_token_id = 2
    batch["input_ids"][:, -1] = 2
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :4] = -100
    report = check_training(model, batch)
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/23530
    """
    ends = sum(known.ends for known in facts.labels)
    padding = sum(known.padding_ends for known in facts.labels)
    if not ends + padding or any(known.end_targets for known in facts.labels):
        return
    yield Violation(
        where="labels",
        observed=f"{ends or padding} sequences end with the end token (eos), and none of their labels is the end token"
        + ("" if ends else "; by attention_mask it is padding there"),
        expected="the end token among the labels, so that the model learns to stop",
        fix="use a pad token of its own, or ignore by attention_mask and not by token: batch['labels'] = "
        "batch['input_ids'].masked_fill(batch['attention_mask'] == 0, -100)"
        if ends
        else "use a pad token of its own",
        severity=None if ends else "info",
    )
