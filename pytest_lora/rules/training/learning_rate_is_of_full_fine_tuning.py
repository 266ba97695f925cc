from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import unusual_inits
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

MOVES_NOTHING = 0.01
"""Share of its input that all steps together could add to the output of a module. Sixty steps at 2e-4 with
r=16, alpha=16, the shortest recipe in wide use that learns, reach 0.028; 63 at 2e-5 with r=8, alpha=16, whose
loss rose, 0.004. On the built-in base 0.013 lowers the loss by a tenth."""

SETS_A_COURSE = 50
"""Steps from which on a run is meant to get somewhere: the shortest recipes in wide use take 60."""

LONG = 1_000
"""A run below ``SETS_A_COURSE`` may try out the recipe of a longer one, which is judged by so many steps."""

TOLD_ALREADY = 1e-7
"""Below, LORA305 says that no number of steps gets anywhere."""

DEFAULTS = {5e-5: "transformers' TrainingArguments", 2e-5: "TRL's SFTConfig"}
"""Learning rates that these have where none is given; both were chosen for full fine-tuning."""

LANGUAGE = 0.75
"""Above this first loss it is no loss of preferences or rewards, which begin at ln(2) or below and take lower rates."""


@rule("LORA370", severity="warning", needs=TrainingFacts)
def learning_rate_is_of_full_fine_tuning(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The learning rate is one of full fine-tuning, and moves the adapter next to nowhere.

    ## What it does
    A step of Adam moves each number of `lora_B` by about the rate, and so changes the output of its module by
    `rate * scaling * sqrt(r / 3)` of its input. Times the optimizer steps that the schedule was made for, or that a
    `Trainer` is to take, that is how far a new adapter can get; fewer than 50 steps may try out a longer recipe and
    count as 1,000. Below 1 % it is a warning, unless the losses so far fell. Where the number
    of steps is not known, the default rates of transformers (5e-5) and TRL's SFT (2e-5) are an info. Preference tuning
    and reinforcement learning go by other rates and are not judged.

    ## Why is this bad?
    LoRA takes about ten times the rate of full fine-tuning, for few numbers have to make the change of many. At a rate
    left over from there the loss falls a little at best, and the run looks like one whose data teach nothing.

    ## Example
    ```python
    from transformers import get_cosine_schedule_with_warmup
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 3, 63)
    report = check_training(model, batch, optimizer=optimizer, scheduler=scheduler)
    ```

    ## Use instead
    ```python
    from transformers import get_cosine_schedule_with_warmup
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 3, 63)
    report = check_training(model, batch, optimizer=optimizer, scheduler=scheduler)
    ```

    ## References
    - TRL, learning rates with LoRA (SFT 2e-4 for 2e-5): https://huggingface.co/docs/trl/main/en/peft_integration
    - LoRA Without Regret: https://thinkingmachines.ai/blog/lora/
    """
    rate = facts.peak_rate
    if not _judged(facts) or not TOLD_ALREADY < rate < math.inf:
        return
    planned = facts.known_steps
    known_as = next((name for default, name in DEFAULTS.items() if math.isclose(rate, default)), None)
    if planned is None and known_as:
        yield Violation(
            where=f"optimizer ({facts.optimizer.optimizer})",
            observed=f"a learning rate of {rate:g}, the default of {known_as}, which was chosen for full fine-tuning",
            expected="about ten times that for LoRA, 1e-4 to 5e-4",
            fix="set lr=2e-4 (learning_rate of a Trainer), unless this one was found by trying",
            severity="info",
        )
    if planned is None:
        return
    steps = planned if planned >= SETS_A_COURSE else max(planned, LONG)
    strength = max(abs(one.scaling) * math.sqrt(one.rank / 3) for one in facts.model.active_layers)
    reach = rate * steps * strength
    if reach < MOVES_NOTHING:
        default = f", the default of {known_as}," if known_as else ""
        yield Violation(
            where=f"optimizer ({facts.optimizer.optimizer})",
            observed=f"{_told(planned, steps)} at a learning rate of {rate:g}{default} change the output of a module "
            f"by {reach:.2%} of its input at most: the adapter gets nowhere",
            expected=f"{MOVES_NOTHING:.0%} or more, as LoRA takes about ten times the rate of full fine-tuning",
            fix=f"set the learning rate higher: lr={max(2e-4, _needed(rate, reach)):.1g}",
        )


def _judged(facts: TrainingFacts) -> bool:
    """Whether it is a new adapter that learns texts or classes by steps of the size of the rate."""
    trained = facts.optimizer_given and facts.optimizer.adaptive and bool(facts.steps)
    own_loss = (
        facts.custom_loss and facts.objective != "texts" and facts.steps and facts.steps[0].loss < LANGUAGE
    )
    other = facts.compares_answers or facts.objective == "policy" or own_loss
    return (
        trained and facts.is_fresh and not facts.history_fell and not other and not unusual_inits(facts.model)
    )


def _told(planned: int, steps: int) -> str:
    return f"{planned} steps" if steps == planned else f"{planned} steps, and even {steps:,},"


def _needed(rate: float, reach: float) -> float:
    return rate * 2 * MOVES_NOTHING / reach
