from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA362", severity="warning", needs=TrainingFacts)
def placeholder_is_a_target(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Placeholders of images, videos or audio are in the labels.

    ## What it does
    Looks for labels that are the model's placeholder token (`image_token_id` and its sisters), which keeps the place
    of features that the model puts there.

    ## Why is this bad?
    The model is taught to write placeholders. They are many, equal and easy to predict, so that the loss falls
    quickly and says little about the text; the tuned model writes `<image>` into its answers.

    ## Example
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(image_text_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    batch = image_text_batch
    batch["labels"] = batch["input_ids"].clone()
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(image_text_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    batch = image_text_batch
    ids = batch["input_ids"]
    batch["labels"] = ids.masked_fill(ids == image_text_base.config.image_token_id, -100)
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/trl/sft_trainer#training-vision-language-models
    - https://github.com/NielsRogge/Transformers-Tutorials/issues/511
    """
    if facts.custom_loss:
        return
    found = [medium for medium in facts.media if medium.targets]
    for medium in {m.token: m for m in reversed(found)}.values():
        same = [m for m in found if m.token == medium.token]
        batches = ", ".join(str(m.batch) for m in same[:8])
        yield Violation(
            where=f"batches {batches}: labels",
            observed=f"{sum(m.targets for m in same)} of {sum(m.of_targets for m in same)} targets are {medium.medium} "
            f"placeholders ({medium.field}={medium.token}): the loss teaches the model to write them",
            expected=f"no {medium.medium} placeholder among the labels",
            fix=f"set batch['labels'][batch['input_ids'] == {medium.token}] = -100",
        )
