from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA384", severity="error", needs=TrainingFacts)
def mask_is_too_short(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """An attention mask has fewer columns than there are tokens.

    ## What it does
    Compares the shapes of `attention_mask` and `input_ids` of each batch that a step was taken on. A mask may be
    longer, by keys of a cache, and with a `loss_fn` be for other tokens; what a model raises at another length is
    LORA319.

    ## Why is this bad?
    transformers fills a mask that is too short with zeros and says nothing: the last tokens of every row are hidden,
    and nothing that follows can read them, though their labels count.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["attention_mask"] = batch["attention_mask"][:, :12]
    report = check_training(model, batch, ignore=["LORA319"])
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch)
    ```

    ## References
    - https://github.com/hiyouga/LlamaFactory/issues/10736
    """
    if facts.odd and not facts.custom_loss and expect.purpose == "train":
        yield Violation(
            where="; ".join(facts.odd[:8]),
            observed="the mask ends before the tokens do: transformers hides those that are left",
            expected="one value of attention_mask for each token",
            fix="pad and cut input_ids, labels and attention_mask together, in one place: "
            "batch['attention_mask'] = batch['input_ids'].ne(tokenizer.pad_token_id).long(), unless texts hold that "
            "token",
        )
