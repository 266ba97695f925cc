from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA325", severity="error", needs=TrainingFacts)
def loss_is_summed(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The loss is summed where it should be averaged.

    ## What it does
    Compares the losses so far with those measured now on the same batches: as many times as large as
    there are batches, they were summed over accumulation steps. And compares what is measured with
    ln(vocabulary), the loss of a model that knows nothing: many times that, and below it for each label,
    is a sum over tokens.

    ## Why is this bad?
    Gradients grow with the number of steps or tokens, so that the learning rate is in effect that much
    higher, and losses cannot be compared between runs.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, [batch] * 8, history=[38.9, 38.8, 38.8])
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, [batch] * 8, history=[4.87, 4.86, 4.85])
    ```

    ## References
    - https://huggingface.co/blog/gradient_accumulation
    """
    losses = [step.loss for step in facts.steps if math.isfinite(step.loss) and step.loss > 0]
    known = [loss for loss in facts.history if math.isfinite(loss)]
    if not losses:
        return
    now = sum(losses) / len(losses)
    chance = facts.chance
    if known and chance and min(known[0], known[-1]) > ABOVE_CHANCE * chance and known[-1] > SUMMED * now:
        times = known[-1] / now
        exact = facts.batches > 1 and abs(times / facts.batches - 1) < CLOSE
        yield Violation(
            where="the loss",
            observed=f"the loss started at {known[0]:.3g}, {known[0] / chance:.1f} times ln(vocabulary) = {chance:.3g}"
            f", and is {times:.1f} times the {now:.3g} measured on one batch"
            + (f": the sum over {facts.batches} accumulation steps" if exact else ": it is summed"),
            expected="the mean over accumulation steps, about ln(vocabulary) at most",
            fix="divide each loss by the number of accumulation steps, or by all tokens of the accumulated batch",
        )
    elif known and chance is None and _times_the_batches(facts, known, now):
        yield Violation(
            where="the loss",
            observed=f"the loss started at {known[0]:.3g} and was {known[-1]:.3g}, {known[-1] / now:.1f} times the "
            f"{now:.3g} measured on one batch: the sum over {facts.batches} accumulation steps",
            expected="the mean over accumulation steps",
            fix="divide each loss by the number of accumulation steps",
        )
    elif chance and now > SUMMED_TOKENS * chance:
        labels = facts.labels[0].labels
        # A fresh encoder-decoder with a head of its own begins at 30 and more, which says nothing.
        fresh_is_large = facts.labels[0].kind == "sequence"
        if not fresh_is_large and labels >= ENOUGH and now / labels <= ABOVE_CHANCE * chance:
            yield Violation(
                where="the loss",
                observed=f"the loss is {now:.3g}, {now / chance:.0f} times ln(vocabulary) = {chance:.3g}: "
                f"it is summed over {labels} labels",
                expected="the mean over the labels that count",
                fix="use reduction='mean', or divide by the number of labels that are not -100",
                severity="warning",
            )


ABOVE_CHANCE, SUMMED, SUMMED_TOKENS, CLOSE, ENOUGH = 1.5, 1.8, 5.0, 0.2, 8
"""Chance is ln(vocabulary). A fresh or pretrained model lies below 1.5 times that; two accumulated losses, together,
are 2 times one of them, of which 10 % may be learned meanwhile."""


def _times_the_batches(facts: TrainingFacts, known: list[float], now: float) -> bool:
    """Whether classes were told apart at a loss of as many times as there are batches, far above that of guessing."""
    classes = next((k.limit for k in facts.labels if k.kind in ("classes", "tokens") and k.limit), None)
    if classes is None or classes < 2 or facts.batches < 3:
        return False
    guessing = math.log(classes)
    times = [loss / now / facts.batches for loss in (known[0], known[-1])]
    return min(known) > 2 * guessing and all(abs(share - 1) < CLOSE for share in times)
