from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA378", severity="warning", needs=TrainingFacts)
def images_are_bytes(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Images come as whole numbers up to 255, which no processor has normalised.

    ## What it does
    For models that know images or videos (`image_token_id` in their configuration): looks for pixels that are whole
    numbers from 0 to more than 64.

    ## Why is this bad?
    Vision towers were trained on values of about -2 to 2. A hundred times that saturates them: every image looks alike,
    the loss falls by the text alone, and the same model behind its processor sees other images.

    ## Example
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(image_text_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    pixels = torch.randint(0, 256, image_text_batch["pixel_values"].shape)
    image_text_batch["pixel_values"] = pixels.float()
    report = check_training(model, image_text_batch)
    ```

    ## Use instead
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(image_text_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    pixels = torch.randint(0, 256, image_text_batch["pixel_values"].shape)
    image_text_batch["pixel_values"] = (pixels / 255 - 0.48) / 0.27
    report = check_training(model, image_text_batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/image_processor
    """
    for medium in facts.media:
        if medium.raw and medium.placeholders:
            yield Violation(
                where=f"batch {medium.batch}: {', '.join(medium.raw)}",
                observed="whole numbers up to 255: the bytes of images, neither divided nor normalised",
                expected="pixels as the model's own image processor gives them, about -2 to 2",
                fix="give images to the model's processor and keep do_rescale and do_normalize on",
            )
