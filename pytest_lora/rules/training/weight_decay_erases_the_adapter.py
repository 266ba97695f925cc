from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import GroupFacts, OptimizerFacts
from pytest_lora.rules import Violation, rule


@rule("LORA306", severity="warning", needs=OptimizerFacts)
def weight_decay_erases_the_adapter(facts: OptimizerFacts, expect: Expect) -> Iterator[Violation]:
    """The weight decay is so strong that it erases the adapter.

    ## What it does
    Looks for a weight decay of 5 or more, or one that takes 5 % or more off the adapter at every step.

    ## Why is this bad?
    Under AdamW a weight settles where decay and step balance, at no more than 1 / weight_decay, and
    decays by `lr * weight_decay` a step. A decay that was meant as 0.01 and written as 10 pulls the
    update back to zero.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=20.0)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## References
    - Decoupled weight decay: https://arxiv.org/abs/1711.05101
    """
    for group in facts.groups:
        if not {"a", "b"} & set(group.parts) or expect.purpose != "train":
            continue
        share = max(group.lr, group.initial_lr or group.lr) * group.weight_decay
        if group.weight_decay >= MOST or share >= MOST_A_STEP:
            yield Violation(
                where=f"optimizer ({facts.optimizer}), param_groups[{group.index}]",
                observed=f"weight_decay={group.weight_decay:g} takes {100 * share:.3g} % off the adapter at "
                "every step",
                expected="a weight decay of 0 to 0.1; the effect of LoRA is small enough without",
                fix=_fix(group, max(group.lr, group.initial_lr or group.lr)),
                severity="error" if share >= MOST_A_STEP else None,
            )


MOST = 5.0
"""Usual are 0 to 0.1; experiments on regularisation go to 1."""

MOST_A_STEP = 0.05
"""At 5 % a step half of what was learned is gone after 14 steps."""


def _fix(group: GroupFacts, rate: float) -> str:
    """A usual decay where it is not usual, and a usual rate where that would still not be enough."""
    decay = DECAY if group.weight_decay >= MOST or group.weight_decay > DECAY else group.weight_decay
    steps = [f"weight_decay={decay:g}"] if decay != group.weight_decay else []
    if rate * decay >= MOST_A_STEP:
        steps.append("lr=2e-4, the learning rate that the decay is multiplied by")
    return f"set {' and '.join(steps)}"


DECAY = 0.01
"""The default of ``torch.optim.AdamW``."""
