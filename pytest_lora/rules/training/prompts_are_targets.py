from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA373", severity="error", needs=TrainingFacts)
def prompts_are_targets(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Every token is a target, those of the prompts too.

    ## What it does
    Looks for batches of a causal language model in which every token that is attended to has a label, where
    `Expect(completion_only=True)` says that only answers are to be learned. Without that it is an info, for batches
    whose rows are texts of their own, each closed by an end token.

    ## Why is this bad?
    The loss is then mostly that of prompts: the model learns to write questions, and answers count the less the longer
    the questions are. The mask gets lost where a data collator makes labels anew from `input_ids`, or where a template
    of the answer is not found.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, expect=Expect(completion_only=True))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"][:, :8] = -100
    report = check_training(model, batch, expect=Expect(completion_only=True))
    ```

    ## References
    - https://huggingface.co/docs/trl/sft_trainer#train-on-completion-only
    """
    whole = [
        known for known in facts.labels if known.kind == "causal" and known.labels and not known.unlabelled
    ]
    if not expect.completion_only:
        whole = [known for known in whole if known.end_targets == known.ends == known.rows]
    if expect.purpose != "train" or not whole:
        return
    yield Violation(
        where=named_batches(whole),
        observed="100 % of the tokens are targets of the loss: no label is -100"
        + (", and none of the prompt is masked" if expect.completion_only else ", those of a prompt neither"),
        expected="labels of -100 on every token of a prompt"
        if expect.completion_only
        else "that, if texts are to be learned as a whole; if they have prompts, labels of -100 there",
        fix="set the labels of prompts to -100 (TRL: completion_only_loss or assistant_only_loss), after everything "
        "that makes labels from input_ids",
        severity=None if expect.completion_only else "info",
    )
