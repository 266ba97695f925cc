from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.batches import named_batches
from pytest_lora.facts.steps import ALIKE, UNLIKE
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA324", severity="error", needs=TrainingFacts)
def labels_are_shifted_twice(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Labels are shifted already, and the model or the loss shifts them again.

    ## What it does
    Compares labels with input ids: causal models of transformers shift labels themselves, so that a label
    equals the input at its own position. Labels that equal the next input throughout are shifted twice,
    those that equal the previous input are shifted the wrong way as well. A loss of one's own tells by its gradient,
    which is lowest at the token that the loss asks for: that is to be the next one, of a decoder behind an encoder the
    label at the same position.

    ## Why is this bad?
    The model is then trained to predict the token after the next one. The loss falls, to a worse value,
    and generated text skips every other token. Shifted the wrong way it learns to repeat its input.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["input_ids"].roll(-1, dims=1)
    batch["labels"][:, -1] = -100
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["labels"] = batch["input_ids"].clone()
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/tasks/language_modeling
    - https://github.com/huggingface/transformers/issues/32944
    - https://github.com/huggingface/transformers/issues/47394
    """
    if facts.custom_loss:
        yield from _asked_for(facts)
        return
    if facts.shift is not None and facts.shift.forgotten:
        return
    known = [k for k in facts.labels if k.kind == "causal" and k.labels >= ENOUGH and k.same < UNLIKE]
    ahead = [(k, k.ahead) for k in known if k.ahead >= ALIKE]
    behind = [(k, k.behind) for k in known if k.behind >= ALIKE and k.ahead < ALIKE]
    if not ahead:
        yield from _asked_for(facts)
    for shifted, which, outcome in (
        (ahead, "next", "they are shifted already, and the model shifts them once more"),
        (
            behind,
            "previous",
            "they are shifted the wrong way, and the model, which shifts them itself, learns to repeat",
        ),
    ):
        if shifted:
            first, share = shifted[0]
            yield Violation(
                where=f"{named_batches(k for k, _ in shifted)}: labels",
                observed=f"{100 * share:.0f} % of the labels equal the {which} input token, "
                f"{100 * first.same:.0f} % the one at their own position: {outcome}",
                expected="labels[t] == input_ids[t]; the model shifts them",
                fix="set batch['labels'] = batch['input_ids'].clone(), with -100 where nothing is to be learned",
            )


def _asked_for(facts: TrainingFacts) -> Iterator[Violation]:
    """A loss that asks for the token after the next one."""
    taught = facts.taught
    if taught is None or not taught.skips:
        return
    yield Violation(
        where="loss_fn" if facts.custom_loss else f"the loss of {facts.model.base.architecture}",
        observed=f"by its gradient, the loss asks at {taught.later:.0%} of {taught.positions} positions for the token "
        f"after the next one, and at {taught.following:.0%} for the next one: labels are shifted twice",
        expected="a loss that asks for the next token",
        fix="shift once: logits[:, :-1] against labels[:, 1:] where labels are a copy of the input, and logits against "
        "labels, with no shift, where they are shifted already or are those of a decoder behind an encoder",
    )


ENOUGH = 4
"""Labels that a verdict needs."""
