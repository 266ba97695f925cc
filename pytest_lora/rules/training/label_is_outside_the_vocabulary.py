from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA323", severity="error", needs=TrainingFacts)
def label_is_outside_the_vocabulary(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Labels or input ids do not exist in the model.

    ## What it does
    Compares labels with the number of classes or vocabulary rows, and input ids with the rows of the
    embedding. -100 means "ignore"; no other negative number does.

    ## Why is this bad?
    On a CPU the step raises an IndexError; on a GPU a device-side assertion that names neither the batch
    nor the label and leaves the process unusable. No step is taken where this is found. Causes are new
    tokens without `resize_token_embeddings`, a tokenizer of another model, -1 used to ignore, classes
    counted from 1.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"][0, 3] = 128
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"][0, 3] = 127
    report = check_training(model, batch)
    ```

    ## References
    - https://pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """
    for known in facts.labels:
        what, limit = (
            ("classes", known.limit) if known.kind in ("tokens", "classes") else ("vocabulary", known.limit)
        )
        for name, wrong, most in (
            ("labels", known.outside, limit),
            ("input_ids", known.ids_outside, known.ids_limit),
        ):
            if wrong:
                size = f"the {what} of {most}" if most is not None else f"the {what}"
                yield Violation(
                    where=f"batch {known.batch}: {name}",
                    observed=f"{', '.join(map(str, wrong))}: outside {size}",
                    expected=f"numbers from 0 to {most - 1}"
                    if most is not None
                    else "numbers of at least 0"
                    if name == "input_ids"
                    else "classes, and -100 for what is to be ignored",
                    fix=f"after adding tokens call model.resize_token_embeddings({wrong[-1] + 1}), the length of the "
                    "tokenizer; else use the model's own tokenizer"
                    if wrong[-1] >= 0 and what == "vocabulary"
                    else "ignore with -100, count classes from 0, and set num_labels to their number",
                )
