from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA326", severity="warning", needs=TrainingFacts)
def labels_are_of_another_text(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The labels of a causal model are not the tokens of its input.

    ## What it does
    Compares labels with input ids at the same position. Where hardly any are equal, and they are no shifted
    input either, they are tokens of something else. Where most stand at places where the input is one mask token, and
    some do not, a collator for masked language models made them. Labels of nothing but such places are no finding, nor
    are labels for a custom loss.

    ## Why is this bad?
    A causal model reads question and answer as one text, and its labels are that text again. With the
    question as input and the answer as labels, as encoder-decoders take them, it learns to predict the
    answer's tokens from as many tokens of the question. Rows that were shuffled, and labels of another
    tokenizer, look the same.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["input_ids"].flip(0)
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :8] = -100
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/tasks/language_modeling
    """
    if facts.custom_loss:
        return
    strange = [
        known
        for known in facts.labels
        if known.kind == "causal"
        and known.labels >= ENOUGH
        and not known.masked_inputs
        and max(known.same, known.ahead, known.behind) < UNLIKE
    ]
    hidden = [k for k in facts.labels if k.labels >= ENOUGH and HIDDEN <= k.bounds.hidden < ALL]
    if hidden and 2 * len(hidden) > len(facts.labels) and not facts.custom_loss and facts.shifts:
        yield Violation(
            where=f"{named_batches(hidden)}: labels",
            observed=f"{hidden[0].bounds.hidden:.0%} of the labels are at places where the input is one and the same "
            "other token: they are those of a masked language model, and this one predicts the next token",
            expected="whole texts as inputs, and labels for all of their tokens",
            fix="make batches with DataCollatorForLanguageModeling(tokenizer, mlm=False); mlm=True is its default",
        )
    elif strange and 2 * len(strange) > len(facts.labels):
        first = strange[0]
        yield Violation(
            where=f"{named_batches(strange)}: labels",
            observed=f"{100 * first.same:.0f} % of the labels equal the input token at their position: they are "
            "tokens of another text than input_ids",
            expected="labels[t] == input_ids[t]: prompt and answer in both, the prompt's labels -100",
            fix="put prompt and answer into input_ids, and set batch['labels'] = batch['input_ids'].clone() with -100 "
            "over the prompt; "
            "if they are meant to be that, look for shuffled rows and for another tokenizer",
        )


HIDDEN, ALL = 0.6, 0.99
"""Shares of labels. A collator for masked language models hides 80 % of them behind its mask token, and leaves a tenth
as it is; what all labels are hidden behind is what a diffusion language model is to fill in."""

ENOUGH, UNLIKE = 8, 0.2
"""Labels that a verdict needs, and the share of equal ones that two texts have by chance at most."""
