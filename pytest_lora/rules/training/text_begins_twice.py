from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA328", severity="warning", needs=TrainingFacts)
def text_begins_twice(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Texts begin with two begin tokens (BOS).

    ## What it does
    Looks, behind any padding on the left, for rows that begin with `bos_token_id` twice. A begin token that
    also ends texts or pads them is no finding.

    ## Why is this bad?
    A chat template writes the begin token into the text, and the tokenizer puts another before it. The model
    was never trained on that, and at inference, where one of the two is missing, the adapter meets texts that
    it was not trained on either.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.bos_token_id = 1
    batch["input_ids"][:, :2] = 1
    batch["labels"] = batch["input_ids"].clone()
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.config.bos_token_id = 1
    batch["input_ids"][:, 0] = 1
    batch["labels"] = batch["input_ids"].clone()
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/chat_templating
    """
    rows, doubled = (sum(getattr(known, n) for known in facts.labels) for n in ("rows", "double_starts"))
    if doubled and 2 * doubled > rows:
        yield Violation(
            where="input_ids",
            observed=f"{doubled} of {rows} rows begin with two begin tokens (double BOS, bos_token_id)",
            expected="one begin token",
            fix="tokenize what a chat template wrote with add_special_tokens=False, or use "
            "apply_chat_template(..., tokenize=True)",
        )
