from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA327", severity="warning", needs=TrainingFacts)
def padding_is_attended_to(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Padding is not masked, and the tokens of the text attend to it.

    ## What it does
    Looks for runs of the configuration's `pad_token_id` that `attention_mask` does not hide: at the start of
    a row, and in models that look both ways at its end too. Padding on the right of a causal model is behind
    everything that it predicts, and no finding.

    ## Why is this bad?
    The text is read as one that begins with padding, at positions that are shifted by it, so that what is
    learned depends on how much padding a row happens to have. The masked text of an evaluation or a server
    looks different.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:, :6] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:, :6] = 0
    batch["attention_mask"][:, :6] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/troubleshooting#incorrect-output-when-padding-tokens-arent-masked
    """
    padded = [known for known in facts.labels if known.attended_padding]
    if padded:
        rows, of = sum(known.attended_padding for known in padded), sum(known.rows for known in padded)
        given = "attention_mask" in facts.inputs
        yield Violation(
            where=f"{named_batches(padded)}: " + ("attention_mask" if given else "input_ids"),
            observed=f"{rows} of {of} rows have padding on the {padded[0].padded_at} (pad_token_id), and "
            + ("attention_mask is 1 there" if given else "there is no attention_mask")
            + ": the text attends to it",
            expected="an attention_mask that is 0 wherever there is padding",
            fix="hand on the attention_mask of the tokenizer or collator with the input_ids, or set "
            "batch['attention_mask'] = (batch['input_ids'] != model.config.pad_token_id).long()",
        )
