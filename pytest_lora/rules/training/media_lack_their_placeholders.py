from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import MediumFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA361", severity="error", needs=TrainingFacts)
def media_lack_their_placeholders(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Images, videos or audio of a batch and their placeholder tokens do not belong together.

    ## What it does
    Compares the placeholder tokens among `input_ids` (`image_token_id` of the configuration and its sisters) with
    the inputs of that medium: tokens without pixels, pixels without tokens (a warning, as some add an image
    that nothing looks at), another number of tokens than `image_grid_thw` asks for. What the model itself refuses is
    reported as LORA319 (`step_raises`).

    ## Why is this bad?
    Without pixels the model reads the embedding of the placeholder as if it were a word: it learns to answer without
    looking. Without tokens nothing of the image enters the text. The loss falls in both.

    ## Example
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(image_text_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    del image_text_batch["pixel_values"]
    report = check_training(model, image_text_batch)
    ```

    ## Use instead
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(image_text_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    report = check_training(model, image_text_batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/tasks/image_text_to_text
    - https://huggingface.co/docs/trl/sft_trainer#training-vision-language-models
    """
    if facts.custom_loss or facts.failure is not None:
        return
    for medium in facts.media:
        token = f"{medium.medium} placeholders ({medium.field}={medium.token})"
        where = f"batch {medium.batch}: input_ids"
        if medium.placeholders and not medium.inputs:
            yield Violation(
                where=where,
                observed=f"{medium.placeholders} {token} in {medium.rows} rows, and no input holds the pixels "
                "or samples that they stand for"
                if medium.medium != "image"
                else f"{medium.placeholders} {token} in {medium.rows} rows, and no pixel_values",
                expected=f"each {medium.medium} beside its placeholders",
                fix="hand on everything that the model's processor gives: see what the collator, or "
                "remove_unused_columns=True, takes out of the batch",
            )
        elif medium.inputs and not medium.placeholders and _is_alone(medium, facts):
            yield Violation(
                where=where,
                observed=f"{', '.join(medium.inputs)} but no {token}: no token of the text sees them",
                expected=f"a placeholder for each {medium.medium}",
                fix="make text and media in one call of the model's processor, with the placeholder in the text, "
                "and cut no text in which it stands",
                severity="warning",
            )
        elif medium.wanted is not None and medium.inputs and medium.wanted != medium.placeholders:
            yield Violation(
                where=where,
                observed=f"{medium.placeholders} {token}, and {medium.grid} asks for {medium.wanted}",
                expected=f"as many placeholders as the model makes features of each {medium.medium}",
                fix="make text and media in one call of the model's processor, and cut no placeholders afterwards",
            )


def _is_alone(medium: MediumFacts, facts: TrainingFacts) -> bool:
    """Whether no other medium of the batch has placeholders that its inputs may belong to."""
    return not any(m.placeholders for m in facts.media if m.batch == medium.batch)
