from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

SHARE = 0.25
"""Pairs without a difference from which on a batch is much smaller than it was meant to be; single ones are usual."""


@rule("LORA379", severity="warning", needs=TrainingFacts)
def answers_are_the_same(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Chosen and rejected answers are the same tokens.

    ## What it does
    Compares chosen with rejected answers of a batch that holds both with their labels, pair by pair, and speaks from a
    quarter of the pairs on.

    ## Why is this bad?
    Such a pair has a margin of zero whatever the model does, and no gradient. It comes from a prompt so long that both
    answers were cut off where they begin to differ, or from one column read twice.

    ## Example
    ```python
    def preference_loss(model, batch):
        def score(side):
            picked = model(input_ids=batch[side + "_input_ids"]).logits[:, :-1].log_softmax(-1)
            return picked.gather(-1, batch[side + "_input_ids"][:, 1:, None]).sum((1, 2))
        return -torch.nn.functional.logsigmoid(0.1 * (score("chosen") - score("rejected"))).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    chosen, rejected = batch["input_ids"][:2], batch["input_ids"][[0, 3]]
    pairs = {"chosen_input_ids": chosen, "rejected_input_ids": rejected}
    pairs |= {"chosen_labels": chosen.clone(), "rejected_labels": rejected.clone()}
    report = check_training(model, pairs, loss_fn=preference_loss)
    ```

    ## Use instead
    ```python
    def preference_loss(model, batch):
        def score(side):
            picked = model(input_ids=batch[side + "_input_ids"]).logits[:, :-1].log_softmax(-1)
            return picked.gather(-1, batch[side + "_input_ids"][:, 1:, None]).sum((1, 2))
        return -torch.nn.functional.logsigmoid(0.1 * (score("chosen") - score("rejected"))).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    chosen, rejected = batch["input_ids"][:2], batch["input_ids"][2:4]
    pairs = {"chosen_input_ids": chosen, "rejected_input_ids": rejected}
    pairs |= {"chosen_labels": chosen.clone(), "rejected_labels": rejected.clone()}
    report = check_training(model, pairs, loss_fn=preference_loss)
    ```

    ## References
    - https://github.com/huggingface/trl/issues/6548
    """
    rows, same = sum(known.rows for known in facts.answers), sum(known.same for known in facts.answers)
    if same and same >= SHARE * rows:
        yield Violation(
            where="chosen and rejected answers",
            observed=f"{same} of {rows} pairs are the same tokens: their margin is zero whatever the model does",
            expected="answers that differ within the tokens that are kept",
            fix="raise the maximal length so that prompts do not fill it, or drop such pairs; look whether both "
            "columns are read from the data",
        )
