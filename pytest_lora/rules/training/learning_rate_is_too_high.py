from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA304", severity="warning", needs=TrainingFacts)
def learning_rate_is_too_high(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The learning rate is so high that adapters diverge.

    ## What it does
    Looks for a rate of 0.1 or more with an optimizer of the Adam family, whose step is about the rate
    itself whatever the gradient, and for a loss that shoots up, or a `lora_A` that is thrown far beyond
    its own size, within the steps taken.

    ## Why is this bad?
    LoRA takes rates about ten times those of full fine-tuning, 1e-4 to 1e-2 with Adam; `lora_A` starts
    with numbers of about `1 / sqrt(3 * in_features)`, 0.01 in a large model, and one step of 0.1 buries
    them.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.2)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## References
    - LoRA Without Regret, on rates of LoRA and full fine-tuning: https://thinkingmachines.ai/blog/lora/
    """
    rates = [
        r for step in facts.steps for g in facts.optimizer.groups if g.parts for r in (step.rates[g.index],)
    ]
    if facts.schedule and facts.schedule.peak:
        rates.append(facts.schedule.peak)
    rate = max((r for r in rates if not math.isnan(r)), default=0.0)
    suspect = rate >= ADAPTIVE_LIMIT if facts.optimizer.adaptive else facts.optimizer.plain
    soared = _soared(facts) or _buried(facts)
    if not suspect or not (soared or facts.optimizer.adaptive):
        return
    yield Violation(
        where=f"optimizer ({facts.optimizer.optimizer})",
        observed=f"a learning rate of {rate:g}" + (f": {soared}" if soared else ""),
        expected="1e-4 to 1e-2 with Adam; with SGD a rate at which the loss falls",
        fix=f"set lr={'2e-4' if facts.optimizer.adaptive else f'{rate / 10:g}'}",
        severity="error" if soared else None,
    )


ADAPTIVE_LIMIT = 0.1
"""Ten times the largest rate that we know in use for LoRA with Adam, 1e-2 on tiny models."""


def _soared(facts: TrainingFacts) -> str | None:
    """The loss of one batch before and after, where it grew by half and by 0.5 at least, or became NaN."""
    first: dict[int, float] = {}
    for step in facts.steps:
        start = first.setdefault(step.batch, step.loss)
        if math.isfinite(start) and not step.loss <= max(1.5 * start, start + 0.5):
            return f"the loss went from {start:.3g} to {step.loss:.3g}"
    return None


THROWN = 10.0
"""Times its own size that a step may move ``lora_A``; at 1e-2 with Adam it is 2 where the input has 16384 features."""


def _buried(facts: TrainingFacts) -> str | None:
    """How far one step threw ``lora_A``, where that is beyond ``THROWN``."""
    thrown = max(
        (m / t.scale for t in facts.adapter_tensors if t.part == "a" and t.scale > 0 for m in t.moves),
        default=0.0,
    )
    return f"a step moved lora_A by {thrown:.3g} times its own size" if thrown > THROWN else None
