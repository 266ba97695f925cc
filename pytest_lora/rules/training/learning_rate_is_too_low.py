from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import GroupFacts, TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA305", severity="warning", needs=TrainingFacts)
def learning_rate_is_too_low(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The learning rate is so low that the adapter never gets anywhere.

    ## What it does
    Looks for a rate below 1e-7 with an optimizer of the Adam family (below 2e-6 if the losses so far have
    not fallen), and for one so low with plain SGD that a hundred thousand steps would not lower the loss
    by 1 %.

    ## Why is this bad?
    With Adam each step moves each number by about the rate. With SGD it moves them by the rate times the
    gradient, which is small where an adapter starts, so that rates made for Adam do nothing.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## References
    - LoRA Without Regret, on rates of LoRA and full fine-tuning: https://thinkingmachines.ai/blog/lora/
    """
    groups = _deciding_groups(facts)
    known = [step.rates[group.index] for group in groups for step in facts.steps]
    if facts.schedule and facts.schedule.peak:
        known.append(facts.schedule.peak)
    else:
        known += [group.initial_lr or 0.0 for group in groups]
    rate = max(known, default=0.0)
    if not facts.steps or not rate > 0:
        return
    if facts.optimizer.adaptive:
        flat = len(facts.history) >= HISTORY_NEEDED and not facts.history_fell
        too_low, needed = rate < (ADAPTIVE_FLAT if flat else ADAPTIVE_LIMIT), "1e-4 to 1e-3 with Adam"
    else:
        too_low, needed = _crawls(facts, rate), "with SGD 0.1 or more, or else Adam with 1e-4 to 1e-3"
    if too_low:
        yield Violation(
            where=f"optimizer ({facts.optimizer.optimizer})",
            observed=f"a learning rate of {rate:g}{_of(groups)}: the adapter hardly moves",
            expected=needed,
            fix="raise lr; LoRA takes about ten times the rate of full fine-tuning",
        )


def _deciding_groups(facts: TrainingFacts) -> list[GroupFacts]:
    """The groups of lora_B where it trains: the rest cannot act while it stays at zero."""
    groups = facts.optimizer.groups
    return [g for g in groups if "b" in g.parts] or [g for g in groups if "a" in g.parts]


def _of(groups: list[GroupFacts]) -> str:
    return " of lora_B" if all("a" not in group.parts for group in groups) else ""


ADAPTIVE_LIMIT = 1e-7
"""Below this, ten thousand Adam steps move a number by less than 1e-3; LoRA's preference tuning goes to 5e-7."""

ADAPTIVE_FLAT = 2e-6
"""The same limit where the losses so far have not fallen."""

HISTORY_NEEDED = 5
"""Losses that a verdict on a flat history needs."""

STEPS, SHARE = 1e5, 0.01
"""A plain gradient step lowers the loss by rate * norm**2; after so many steps this share should be gone."""


def _crawls(facts: TrainingFacts, rate: float) -> bool:
    if not facts.optimizer.plain:
        return False
    norms = [s.gradient_norm for s in facts.steps if s.gradient_norm and math.isfinite(s.gradient_norm)]
    loss = facts.steps[0].loss
    return bool(norms) and loss > 0.05 and STEPS * rate * max(norms) ** 2 < SHARE * loss
