from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

SAME = 1e-7
"""Relative: the last digit of float32. The difference of two equal numbers is zero, and the loss then ln 2 exactly."""


@rule("LORA387", severity="error", needs=TrainingFacts)
def reference_moves_along(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The reference of a preference loss, or the teacher, is the model that trains, with its adapter on.

    ## What it does
    Looks for a loss on chosen and rejected answers that is ln 2 to the last digit at every step, though gradients
    arrive and the adapter moves, and beside which the active adapter runs with gradients off. A loss that is zero at
    every step but for rounding, and has a gradient of rounding alone, is that of a student which is its own teacher.
    A reference that is the base with its dropout on, as in training mode, is a warning.

    ## Why is this bad?
    The reference is computed with the very weights that train, so that both always agree: the loss says 0.6931 for
    ever, and nothing holds the model near to where it began. It happens where the same object is handed over as model
    and as reference, or `disable_adapter()` is missing around the reference. The distance between a model and itself
    is zero, and distilling it teaches nothing. Dropout makes another reference of the base at every call.

    ## Example
    ```python
    def score(model, ids):
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    def preference_loss(model, batch):
        gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        with torch.no_grad():
            before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    pairs = {"chosen_input_ids": batch["input_ids"][:2], "rejected_input_ids": batch["input_ids"][2:4]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6)
    report = check_training(model, pairs, optimizer=optimizer, loss_fn=preference_loss)
    ```

    ## Use instead
    ```python
    def score(model, ids):
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    def preference_loss(model, batch):
        gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        with torch.no_grad(), model.disable_adapter():
            before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    pairs = {"chosen_input_ids": batch["input_ids"][:2], "rejected_input_ids": batch["input_ids"][2:4]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6)
    report = check_training(model, pairs, optimizer=optimizer, loss_fn=preference_loss)
    ```

    ## References
    - https://github.com/YiyangZhou/POVID/issues/11
    - https://github.com/huggingface/trl/issues/892
    - https://github.com/huggingface/diffusers/pull/6346
    """
    still = all(abs(step.loss - math.log(2)) <= SAME * math.log(2) for step in facts.steps)
    enough = len(facts.steps) > 1 and facts.adapter_learned
    if still and enough and facts.compares_answers and facts.at_itself and not facts.switched_off:
        yield Violation(
            where="loss_fn" if facts.custom_loss else "loss",
            observed=f"the loss is ln 2 to the last digit at all {len(facts.steps)} steps, though the adapter moves: "
            "the reference is the model that trains, with its adapter on",
            expected="a reference that stays where training began",
            fix=f"compute the reference {_APART}",
        )
    elif facts.thinned and facts.switched_off:
        yield Violation(
            where=grouped(facts.thinned),
            observed="the reference, with its adapter off, is computed in training mode: dropout of the base gives "
            "another one at every call",
            expected="a reference that is the same for the same text",
            fix="turn the dropout of the base off (disable_dropout=True in TRL, or p = 0 of its dropout layers), or "
            "compute the reference between model.eval() and model.train()",
            severity="warning",
        )
    elif facts.at_itself and not facts.switched_off and _teaches_nothing(facts):
        yield Violation(
            where="loss_fn" if facts.custom_loss else "loss",
            observed=f"the loss is 0 at all {len(facts.steps)} steps, and so is its gradient, but for rounding: the "
            "teacher is the model that trains, with its adapter on",
            expected="a teacher that differs from the student",
            fix=f"compute the teacher {_APART}",
        )


_APART = (
    "with the adapter off, with torch.no_grad(), model.disable_adapter():, or with a frozen adapter or a model "
    "of its own"
)

ROUNDED = 1e-5
"""Largest loss and gradient of rounding alone: the softmax of a model minus that of itself is some 1e-8 in float32 and
bfloat16 alike, as both are the same numbers. A gradient that trains anything is a thousand times that."""


def _teaches_nothing(facts: TrainingFacts) -> bool:
    """Whether a model that has learned something is compared with itself; rewards and masks of zero explain another."""
    rounded = all(
        abs(step.loss) <= ROUNDED and (step.gradient_norm or 0.0) <= ROUNDED for step in facts.steps
    )
    return (
        bool(facts.steps) and rounded and not (facts.blank or facts.rewards_answers or facts.labels_ignored)
    )
