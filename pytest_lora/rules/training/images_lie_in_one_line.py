from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA377", severity="warning", needs=TrainingFacts)
def images_lie_in_one_line(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Positions that came with a batch put the patches of an image into one line.

    ## What it does
    For models whose positions have three numbers a token (M-RoPE: time, height and width), in batches with images or
    videos and their grids: looks for `position_ids` of two dimensions, as a text has them, and for ones of three in
    which the three never differ at a placeholder.

    ## Why is this bad?
    The model computes the rows and columns of patches only where no `position_ids` are given. A collator that packs
    texts, or that numbers tokens by habit, takes them away without a word, and inference, which does without it, reads
    the image otherwise.

    ## Example
    ```python
    language = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(grid_base, LoraConfig(r=8, lora_alpha=16, target_modules=language))
    grid_batch["position_ids"] = torch.arange(16).expand(2, 16)
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
    - https://github.com/areal-project/AReaL/issues/217
    """
    for medium in facts.media:
        if medium.flat and medium.placeholders:
            yield Violation(
                where=f"batch {medium.batch}: position_ids",
                observed=f"position_ids give each of {medium.placeholders} {medium.medium} placeholders one number, as "
                f"in a text, though {medium.grid} came with them and the positions of this model have three (M-RoPE)",
                expected="positions with the rows and columns of the patches",
                fix="leave position_ids out of the batch, so that the model computes them, or make them with its own "
                "get_rope_index and keep all three (for packed texts four) rows of them",
            )
