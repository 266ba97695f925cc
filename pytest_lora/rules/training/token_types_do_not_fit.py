from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA363", severity="warning", needs=TrainingFacts)
def token_types_do_not_fit(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Token types do not say where the images are, or are left out.

    ## What it does
    For models whose forward pass takes `mm_token_type_ids` (`token_type_ids` in Gemma 3): looks for placeholders that
    they call text (0), and for batches with images that leave them out and bring no `position_ids` either.

    ## Why is this bad?
    The model places images by them: their rows and columns in the positions, or the tokens that see each other
    both ways. Without them an image is read as a line of words, without a word of warning; the same model at
    inference, where the processor gives them, reads it otherwise.

    ## Example
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(grid_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    del grid_batch["mm_token_type_ids"]
    report = check_training(model, grid_batch)
    ```

    ## Use instead
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(grid_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    report = check_training(model, grid_batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/model_doc/qwen2_5_vl
    """
    if facts.custom_loss or facts.failure is not None:
        return
    for medium in facts.media:
        if not (medium.types and medium.placeholders and medium.inputs):
            continue
        placed = "position_ids" in facts.inputs and medium.types.startswith("mm_")
        if medium.untyped is None and not placed:
            observed = (
                f"no {medium.types}, though there are {medium.placeholders} {medium.medium} placeholders and "
            )
            observed += "the model takes it: it reads them as a text, one after the other"
        elif medium.untyped:
            observed = (
                f"{medium.types} are 0 (text) at {medium.untyped} of {medium.placeholders} {medium.medium} "
            )
            observed += f"placeholders ({medium.field}={medium.token}): they lie elsewhere than input_ids say"
        else:
            continue
        yield Violation(
            where=f"batch {medium.batch}: {medium.types}",
            observed=observed,
            expected=f"{medium.types} above 0 exactly where input_ids are placeholders",
            fix=f"hand on the {medium.types} of the processor, and pad, cut and shift them as input_ids",
        )
