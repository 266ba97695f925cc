from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

ENOUGH = 2
"""Texts that a verdict needs."""


@rule("LORA389", severity="warning", needs=TrainingFacts)
def texts_end_with_a_header(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Every text ends with the header of an answer, and no answer behind it.

    ## What it does
    Looks for causal batches in which the last three tokens of all texts are those that come before their first label.

    ## Why is this bad?
    `add_generation_prompt=True` is for inference. In training it writes a header behind the answer, in the place of the
    end: the model learns to begin another answer where it is to stop.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for start in (3, 13):
        batch["input_ids"][:, start : start + 3] = batch["labels"][:, start : start + 3] = torch.tensor([5, 6, 7])
    batch["labels"][:, :6] = -100
    report = check_training(model, batch, ignore=["LORA374"])
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["input_ids"][:, 3:6] = torch.tensor([5, 6, 7])
    batch["labels"][:, :6] = -100
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main/en/chat_templating#add-generation-prompt
    """
    known = [k for k in facts.labels if k.kind == "causal"]
    rows = sum(k.rows for k in known)
    if rows >= ENOUGH and all(k.bounds.header == k.rows for k in known) and expect.purpose == "train":
        yield Violation(
            where=f"{named_batches(known)}: input_ids",
            observed=f"all {rows} texts end with the three tokens that come before their first label: the header of an "
            "answer, with none behind it",
            expected="texts that end with an answer and its end token",
            fix="make the texts of a training with apply_chat_template(..., add_generation_prompt=False)",
        )
