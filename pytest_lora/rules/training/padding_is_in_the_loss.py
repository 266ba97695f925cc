from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA321", severity="error", needs=TrainingFacts)
def padding_is_in_the_loss(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Padding has labels, so the model learns to predict the pad token.

    ## What it does
    Counts labels that are not -100 where `attention_mask` is 0, or, without a mask that says so, in a run
    of the configuration's `pad_token_id` that ends a row, or of three end tokens or more where these pad.
    The one end token after a text may have a label.

    ## Why is this bad?
    Padding is easy to predict: the loss looks lovely, most of it is about padding, and the model learns
    to stop or to repeat the pad token. It comes from `labels = input_ids.clone()` on padded rows.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:, 6:] = 0
    batch["attention_mask"][:, 6:] = 0
    batch["labels"] = batch["input_ids"].clone()
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:, 6:] = 0
    batch["attention_mask"][:, 6:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/tasks/language_modeling
    """
    labels, padding = (sum(getattr(k, name) for k in facts.labels) for name in ("labels", "padding"))
    if padding == labels and all(known.padding_by == "attention_mask" for known in facts.labels) and padding:
        yield _inverted(any(known.unlabelled for known in facts.labels), labels)
    elif padding:
        by, kind = next((known.padding_by, known.kind) for known in facts.labels if known.padding)
        yield Violation(
            where=f"labels, told by {by}",
            observed=f"padding has labels: {padding} of {labels} positions in the loss "
            f"({100 * padding / labels:.0f} %) are padding",
            expected="labels of -100 wherever there is padding",
            fix="ignore it: batch['labels'][batch['attention_mask'] == 0] = -100"
            if by == "attention_mask"
            else "ignore it: set labels to -100 where the attention_mask of the tokenized labels is 0, as "
            "DataCollatorForSeq2Seq does"
            if kind == "sequence"
            else "ignore it: batch['labels'][batch['input_ids'] == model.config.pad_token_id] = -100, and set "
            "attention_mask to 0 there",
            severity="error" if padding >= SHARE * labels else "warning",
        )


SHARE = 0.1
"""From this share on the loss says more about padding than a reader of it will expect."""


def _inverted(shows_others: bool, labels: int) -> Violation:
    """A mask that hides every token with a label."""
    return Violation(
        where="attention_mask",
        observed=f"all {labels} labels that count are at positions which attention_mask hides (0)"
        + (
            ", and what it shows (1) has none: it says the opposite"
            if shows_others
            else ", as it does all of them"
        ),
        expected="an attention_mask of 1 at text and 0 at padding",
        fix="turn the mask round: batch['attention_mask'] = 1 - batch['attention_mask']",
        severity="error",
    )
