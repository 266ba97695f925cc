from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import GroupFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA305", severity="warning", needs=TrainingFacts)
def learning_rate_is_too_low(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The learning rate is so low that the adapter never gets anywhere.

    ## What it does
    Looks for a rate below 1e-7 with an optimizer of the Adam family (below 2e-6 if the losses so far have
    not fallen), times what an `eps` far above the gradients leaves of it, for an Adafactor that multiplies its rate by
    the size of a `lora_B` that is zero (1e-3 at least), so that 500 steps and more pass before it reaches that size (a
    tenth of the run, where its length is known), and for one so low with plain SGD
    that a hundred thousand steps (a thousand, if the losses have not fallen) would not lower the loss by
    1 %, or that all steps of the run, where it says how many, would not lower it by 0.1 %. Where the losses
    have not fallen, also for a schedule that keeps the rate that low now: one that every step halves at least,
    or a warm-up of more than a hundred times the steps taken.

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
    rate = facts.peak_rate
    if not facts.steps or not rate > 0:
        return
    least = max(OFF_THE_FLOOR, WARM_UP_SHARE * (facts.known_steps or 0))
    if (floor := _floor(facts, groups)) and 1 / rate > least:
        yield _scaled_by_nothing(facts, rate, floor)
        return
    eps, left = _left_by_eps(facts, groups)
    if facts.optimizer.adaptive:
        limit = ADAPTIVE_FLAT if facts.history_is_flat else ADAPTIVE_LIMIT
        too_low, needed = rate * left < limit, "1e-4 to 1e-3 with Adam"
        if too_low and rate >= limit:
            yield _outweighed(facts, eps, rate, left)
            return
        if not too_low:
            yield from _kept_low(facts, groups, rate)
    else:
        too_low, needed = _crawls(facts, rate), "with SGD 0.1 or more, or else Adam with 1e-4 to 1e-3"
    if too_low:
        yield Violation(
            where=f"optimizer ({facts.optimizer.optimizer})",
            observed=f"a learning rate of {rate:g}{_of(groups)}: the adapter hardly moves",
            expected=needed,
            fix=f"raise lr, such as lr={'1e-4' if facts.optimizer.adaptive else '0.1'}; LoRA takes about ten times the "
            "rate of full fine-tuning",
        )


def _deciding_groups(facts: TrainingFacts) -> list[GroupFacts]:
    """The groups of lora_B where it trains: the rest cannot act while it stays at zero."""
    groups = facts.optimizer.groups
    return [g for g in groups if "b" in g.parts] or [g for g in groups if "a" in g.parts]


def _of(groups: list[GroupFacts]) -> str:
    return " of lora_B" if all("a" not in group.parts for group in groups) else ""


OFF_THE_FLOOR = 500
"""Steps in which Adafactor is to bring `lora_B` from zero to the floor of its scaling: each moves it by rate * floor,
so that it takes 1 / rate of them. torch's default rate of 1e-2 takes 100, and Adam's 2e-4, left as it is, 5,000."""

ADAPTIVE_LIMIT = 1e-7
"""Below this, ten thousand Adam steps move a number by less than 1e-3; LoRA's preference tuning goes to 5e-7."""

ADAPTIVE_FLAT = 2e-6
"""The same limit where the losses so far have not fallen."""

STEPS, STEPS_FLAT, SHARE = 1e5, 1e3, 0.01
"""A plain gradient step lowers the loss by rate * norm**2; after so many steps this share should be gone. Fewer are
allowed where the losses so far have not fallen."""

SHARE_OF_A_RUN = 0.001
"""The same for the steps that a run is known to take: a tenth, as momentum of 0.9 makes ten steps of one."""

OUTWEIGHED = 0.1
"""Where eps takes less than nine tenths of a step, the gradients are small and not the eps large."""

LONG_WARM_UP = 100
"""Times the steps taken: a run that is one percent into its warm-up has not been given a rate yet."""

WARM_UP_SHARE = 0.1
"""Of the steps that a schedule was made for, a warm-up up to this share is the usual one, however long it is."""


def _floor(facts: TrainingFacts, groups: list[GroupFacts]) -> float | None:
    """What the rate is multiplied by at the start of an adapter, under an optimizer that scales it by parameters."""
    floors = [g.floor for g in groups]
    return max(f for f in floors if f) if facts.is_fresh and floors and all(floors) else None


def _scaled_by_nothing(facts: TrainingFacts, rate: float, floor: float) -> Violation:
    return Violation(
        where=f"optimizer ({facts.optimizer.optimizer})",
        observed=f"the learning rate of {rate:g} is multiplied by the size of lora_B, which is zero and counts as "
        f"{floor:g}: a step moves it by {rate * floor:.1g}, and {1 / rate:,.0f} steps pass until it is that large",
        expected="a rate that is taken as it is",
        fix="set scale_parameter=False, relative_step=False with lr=2e-4 in transformers' Adafactor (a Trainer's "
        "optim='adafactor' does), or with torch's set lr=1e-2",
    )


def _left_by_eps(facts: TrainingFacts, groups: list[GroupFacts]) -> tuple[float, float]:
    """Adam's eps, and what it leaves of a step whose gradient is g: about g / (g + eps)."""
    eps = min((g.eps for g in groups if g.eps is not None), default=0.0)
    known = [
        norm / math.sqrt(t.numbers)
        for t in facts.adapter_tensors
        if t.held
        for norm in t.gradients
        if norm and math.isfinite(norm)
    ]
    largest = max(known, default=0.0)
    left = largest / (largest + eps) if facts.optimizer.adam and largest and eps else 1.0
    return eps, left if left < OUTWEIGHED else 1.0


def _outweighed(facts: TrainingFacts, eps: float, rate: float, left: float) -> Violation:
    return Violation(
        where=f"optimizer ({facts.optimizer.optimizer})",
        observed=f"eps={eps:g} outweighs the gradients: of a learning rate of {rate:g} it leaves {rate * left:.2g}, "
        "too small a step, and the adapter hardly moves",
        expected="an eps well below the gradients, such as Adam's default of 1e-8",
        fix="set eps=1e-8 (float16 weights aside, which need float32 copies rather than a larger eps)",
    )


def _kept_low(facts: TrainingFacts, groups: list[GroupFacts], peak: float) -> Iterator[Violation]:
    """A schedule that keeps the rate too low now, in a run whose losses have not fallen."""
    schedule = facts.schedule
    if schedule is None or not facts.history_is_flat:
        return
    first, last = (max(step.rates[g.index] for g in groups) for step in (facts.steps[0], facts.steps[-1]))
    taken = schedule.steps_taken
    if not 0 < max(first, last) < min(ADAPTIVE_FLAT, peak / 10):
        return
    if last > first:
        until = max(schedule.not_before or 0, schedule.warm_up or 0)
        whole = schedule.planned
        in_proportion = whole and schedule.warm_up and schedule.warm_up <= WARM_UP_SHARE * whole
        if not taken or until <= LONG_WARM_UP * taken or in_proportion:
            return
        why = f"warm-up: it is {last:.2g} after {taken} steps, and below its peak of {peak:g} until step {until}"
        fix = "warm up over 3 to 10 % of the optimizer steps of this run, and step the scheduler once each of them"
    elif _decays_geometrically([max(step.rates[g.index] for g in groups) for step in facts.steps]):
        why = f"decay: the schedule brought it from {peak:g} down to {first:.2g} within {taken} steps"
        fix = "let the schedule decay over the optimizer steps of the whole run (gamma is for each call of its step)"
    else:
        return  # the end of a cosine or a line, which it may have reached in its time
    yield Violation(
        where=f"scheduler ({schedule.schedule})",
        observed=f"the learning rate is too low to learn from, by {why}; the loss has not fallen",
        expected="a schedule at 1e-5 or more for most of the run",
        fix=fix,
    )


def _decays_geometrically(rates: list[float]) -> bool:
    """Whether each step halves the rate at least, by one and the same factor."""
    factors = [after / before for before, after in pairwise(rates) if before > 0]
    return len(factors) > 1 and 0 < max(factors) <= 0.5 and max(factors) < 1.05 * min(factors)


def _crawls(facts: TrainingFacts, rate: float) -> bool:
    if not facts.optimizer.plain:
        return False
    norms = [s.gradient_norm for s in facts.steps if s.gradient_norm and math.isfinite(s.gradient_norm)]
    loss = facts.steps[0].loss
    steps = STEPS_FLAT if facts.history_is_flat else STEPS
    if not norms or loss <= 0.05:
        return False
    planned = facts.known_steps or (facts.schedule.ends if facts.schedule else None)
    lowered = rate * max(norms) ** 2
    return steps * lowered < SHARE * loss or bool(planned and planned * lowered < SHARE_OF_A_RUN * loss)
