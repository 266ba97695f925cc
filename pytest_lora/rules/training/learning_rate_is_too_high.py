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
    its own size, within the steps taken. Above 1e-3 it is also too high where the losses so far went from
    below half of ln(vocabulary) to about that or more, and at any rate where they rose to far more.

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
    holding = [group.index for group in facts.optimizer.groups if group.parts]
    rates = [step.rates[index] for step in facts.steps for index in holding]
    if facts.schedule and facts.schedule.peak:
        rates.append(facts.schedule.peak)
    rate = max((r for r in rates if not math.isnan(r)), default=0.0)
    exploded, unlearned = _exploded(facts), _unlearned(facts)
    if facts.optimizer.adaptive:
        suspect = bool(exploded) or rate >= (ADAPTIVE_FORGETS if unlearned else ADAPTIVE_LIMIT)
    else:
        suspect = facts.optimizer.plain
    thrown = _thrown(facts)
    buried = f"a step moved lora_A by {thrown:.3g} times its own size" if thrown > THROWN else None
    soared = exploded or unlearned or _soared(facts) or buried
    if not suspect or not (soared or facts.optimizer.adaptive):
        return
    yield Violation(
        where=f"optimizer ({facts.optimizer.optimizer})",
        observed=f"a learning rate of {rate:g}" + (f": {soared}" if soared else ""),
        expected="1e-4 to 1e-2 with Adam; with SGD a rate at which the loss falls",
        fix=f"set lr={'2e-4' if facts.optimizer.adaptive else _lower(rate, thrown)}",
        severity="error" if soared else None,
    )


def _lower(rate: float, thrown: float) -> str:
    """A tenth of a rate, or the power of ten of it under which a step is no larger than ``lora_A``."""
    powers = math.ceil(math.log10(thrown)) if 1 < thrown < math.inf else 1
    return f"{rate / 10**powers:g}"


ADAPTIVE_LIMIT = 0.1
"""Ten times the largest rate that we know in use for LoRA with Adam, 1e-2 on tiny models."""


ADAPTIVE_FORGETS = 1e-3
"""From this rate on Adam can make a pretrained model forget everything within a few steps."""


def _unlearned(facts: TrainingFacts) -> str | None:
    """The losses so far, where they went from those of a model that knows the language to those of none."""
    losses, chance = facts.history, facts.chance
    if chance is None or len(losses) < 4 or not all(map(math.isfinite, losses)):
        return None
    if not losses[0] < 0.5 * chance or min(losses[-3:]) < 0.8 * chance:
        return None
    return _course(losses, chance)


def _exploded(facts: TrainingFacts) -> str | None:
    """The losses so far, where the last three rose from what knowing nothing gives, or less, to far more than that."""
    losses, chance = facts.history, facts.chance
    if chance is None or len(losses) < 4 or not all(map(math.isfinite, losses)):
        return None
    before, middle, last = losses[-3:]
    if losses[0] > 1.1 * chance or not before < middle < last or last < 1.5 * chance:
        return None
    return _course(losses, chance)


def _course(losses: tuple[float, ...], chance: float) -> str:
    course = f"the loss so far diverged and rose from {losses[0]:.3g} to {losses[-1]:.3g}"
    return f"{course}, where knowing nothing gives {chance:.3g}"


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


def _thrown(facts: TrainingFacts) -> float:
    """Times its own size that one step moved ``lora_A`` at most."""
    factors = [t for t in facts.adapter_tensors if t.part == "a" and t.scale > 0]
    return max((move / tensor.scale for tensor in factors for move in tensor.moves), default=0.0)
