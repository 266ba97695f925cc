from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA310", severity="error", needs=TrainingFacts)
def training_is_not_finite(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The loss, the gradients or the adapter itself are NaN or infinite.

    ## What it does
    Looks at adapter weights before the first step, at losses and gradients of every step, and at the inputs
    of the batches that no step was taken on. What labels or float16 weights explain is left to the rules on
    those.

    ## Why is this bad?
    One NaN spreads to every weight with the next step, and nothing brings it back. Some trainers log the
    loss of such a step as 0.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(float("nan"))
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch)
    ```

    ## References
    - https://github.com/hiyouga/LlamaFactory/issues/8088
    """
    spoiled = [t.name for t in facts.tensors if not t.finite and t.part != "base"]
    if spoiled:
        yield Violation(
            where=grouped(spoiled),
            observed="adapter weights are NaN or infinite before the first step"
            + (", and so is the loss" if not facts.finite else ""),
            expected="finite adapter weights",
            fix="build or load the adapter anew, then look for the step that made it NaN: dtype, attention mask, "
            "data, learning rate",
        )
    elif not facts.labels_ignored and not facts.trains_float16:
        yield from _at_a_step(facts)
        if facts.spoiled and facts.finite:
            yield Violation(
                where="; ".join(facts.spoiled[:8]),
                observed="inputs are NaN or infinite: the step on this batch makes every adapter weight NaN",
                expected="finite inputs in every batch",
                fix="look at how these inputs are made (a division by a spread of zero, a broken file), or drop them",
            )


def _at_a_step(facts: TrainingFacts) -> Iterator[Violation]:
    for number, step in enumerate(facts.steps, 1):
        if step.finite:
            continue
        loss_is_finite = math.isfinite(step.loss)
        if loss_is_finite and facts.scaler and number < len(facts.steps):
            continue  # A GradScaler finds its scale by skipping the steps at which gradients overflow.
        base = facts.model.nonfinite_base
        normless = [layer.module for layer in facts.model.active_layers if layer.normless]
        yield Violation(
            where=f"step {number}, batch {step.batch}",
            observed=(
                "a gradient is NaN or infinite although the loss is not"
                if loss_is_finite
                else f"the loss is {step.loss}"
            )
            + (f"; base weights are too: {grouped(base)}" if base else "")
            + (f"; DoRA divides by the norm of rows that are zero: {grouped(normless)}" if normless else "")
            + ("" if base else _empty_answers(facts, step.batch)),
            expected="finite losses and gradients",
            fix="load the base anew"
            if base
            else "leave these modules out of target_modules, or set use_dora=False"
            if normless
            else _OF_CTC
            if _is_too_long(facts, step.loss)
            else _OF_ANSWERS
            if _empty_answers(facts, step.batch)
            else _remedy(number),
        )
        return


_OF_CTC = (
    "drop rows whose labels are longer than the frames that the model makes of their audio, for which there is no CTC "
    "loss, or set model.config.ctc_zero_infinity = True"
)


_OF_ANSWERS = (
    "drop rows that have no answer left, or raise the maximal length; a loss that divides by the number of targets of "
    "a row needs one at least"
)


def _empty_answers(facts: TrainingFacts, batch: int) -> str:
    """What answers without a token explain: a mean over none of them is 0 / 0."""
    for known in facts.answers:
        if known.batch == batch and known.empty:
            return (
                f"; an answer has no token that counts ({known.named}) in {known.empty} of {known.rows} rows"
            )
    return ""


def _is_too_long(facts: TrainingFacts, loss: float) -> bool:
    """A CTC loss is infinite, and not NaN, where labels do not fit into the frames."""
    return facts.model.base.architecture.endswith("CTC") and math.isinf(loss)


def _remedy(number: int) -> str:
    if number == 1:
        return (
            "look at this batch (a row without any attended token, inputs that are not finite) and at the "
            "compute dtype: float16 overflows at 65504, bfloat16 does not"
        )
    return "lower the learning rate, and clip gradients at 1.0"
