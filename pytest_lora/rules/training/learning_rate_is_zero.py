from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TRIED_OUT, TrainingFacts
from pytest_lora.findings import Severity
from pytest_lora.rules import Violation, rule


@rule("LORA303", severity="error", needs=TrainingFacts)
def learning_rate_is_zero(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The learning rate is zero and stays there.

    ## What it does
    Looks at the learning rate of every real step, and of a `LambdaLR` at later ones too. A first step at
    zero is how a warm-up begins, unless losses that do not fall show that the scheduler is never stepped. A
    schedule that has come to its end after the loss fell has done its work. One that was stepped twice or more for
    each step that Adam counts is a warning, and so is one that comes to its end while a fifth or more of the steps that
    a `Trainer` or `watch_training(total_steps=...)` is to take are still ahead.

    ## Why is this bad?
    At a rate of zero nothing changes. It comes from a schedule made for zero steps, for epochs but
    stepped once a batch, for one process but stepped by each of several, or for the steps of an earlier, shorter run.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 100))
    report = check_training(model, batch, optimizer=optimizer, scheduler=scheduler)
    ```

    ## References
    - https://github.com/lm-sys/FastChat/issues/2558
    - https://github.com/huggingface/accelerate/issues/2926
    """
    if len(facts.steps) < (2 if facts.schedule else 1):
        return
    ended_early = facts.schedule and facts.schedule.ends and 2 * facts.schedule.ends < len(facts.history)
    if facts.rates_are_zero or ended_early:
        yield from _everywhere(facts)
    elif facts.schedule and _never_stepped(facts):
        yield Violation(
            where=f"scheduler ({facts.schedule.schedule})",
            observed=f"the scheduler was not stepped in a run of {len(facts.history)} losses: the learning rate is "
            "still the 0 that its warm-up begins with, and the loss has not fallen",
            expected="a learning rate that rises with every optimizer step of the warm-up",
            fix="call scheduler.step() after every optimizer.step(), not once an epoch",
            severity="warning",
        )
    elif over := _over_too_soon(facts):
        yield over
    else:
        yield from _in_some_groups(facts)


LEFT = 0.2
"""Share of a run at a rate of zero that no recipe asks for: cool-downs at zero are a few steps long."""


def _over_too_soon(facts: TrainingFacts) -> Violation | None:
    schedule, total = facts.schedule, facts.total_steps
    if not schedule or not schedule.ends or not total or total < TRIED_OUT:
        return None
    if schedule.ends > (1 - LEFT) * total:
        return None
    return Violation(
        where=f"scheduler ({schedule.schedule})",
        observed=f"the learning rate is 0 from step {schedule.ends} on, in a run of {total}: the last "
        f"{total - schedule.ends} steps change nothing",
        expected="a learning rate above 0 until training ends",
        fix=f"make the schedule for the optimizer steps of this run: num_training_steps={total}",
        severity="warning",
    )


def _everywhere(facts: TrainingFacts) -> Iterator[Violation]:
    schedule = facts.schedule
    set_to_zero = all(group.initial_lr == 0 for group in facts.optimizer.groups)
    if schedule is None or set_to_zero:
        yield Violation(
            where=f"optimizer ({facts.optimizer.optimizer})",
            observed=f"the learning rate is 0 at all {len(facts.steps)} steps",
            expected="a learning rate above 0, such as 1e-4 to 1e-3 with Adam",
            fix=f"set lr={_rate(facts)}, or where a Trainer makes the optimizer learning_rate={_rate(facts)}",
        )
        return
    taken = schedule.steps_taken
    fix = "give the schedule the true number of optimizer steps, and step it once an optimizer step"
    ended = schedule.ends is None or 0 < schedule.ends <= taken
    if ended and taken > 1 and (facts.history_fell or not facts.history):
        hurried = not facts.history and taken >= 2 * facts.optimizer.steps > 0
        severity: Severity = "warning" if hurried else "info"
        observed = f"the schedule has come to its end after {taken} steps: the learning rate is 0" + (
            f", and the optimizer has taken {facts.optimizer.steps}" if hurried else ""
        )
        if hurried:
            fix = (
                "step the schedule once an optimizer step, or make it for all steps that it takes: one that accelerate "
                "has prepared takes a step for each process, num_training_steps * accelerator.num_processes in all"
            )
    else:
        severity = "error"
        observed = f"the scheduler keeps the learning rate at 0 (step {taken}" + (
            f", zero from step {schedule.ends} on)" if schedule.ends is not None else ")"
        )
    yield Violation(
        where=f"scheduler ({schedule.schedule})",
        observed=observed,
        expected="a learning rate above 0 until training ends",
        fix=fix,
        severity=severity,
    )


def _never_stepped(facts: TrainingFacts) -> bool:
    schedule = facts.schedule
    rates = [facts.steps[0].rates[g.index] for g in facts.optimizer.groups if g.parts]
    return schedule is not None and schedule.steps_taken == 0 and not any(rates) and facts.history_is_flat


def _in_some_groups(facts: TrainingFacts) -> Iterator[Violation]:
    for group in facts.optimizer.groups:
        if "b" not in group.parts and "saved" not in group.parts:
            continue
        if not any(step.rates[group.index] for step in facts.steps) and not group.initial_lr:
            what = "lora_B" if "b" in group.parts else "the head (modules_to_save)"
            yield Violation(
                where=f"optimizer ({facts.optimizer.optimizer}), param_groups[{group.index}]",
                observed=f"the learning rate of {what} is 0",
                expected="a learning rate above 0 for everything that is to learn",
                fix=f"set lr={_rate(facts)} for this group, or freeze its parameters if they are not to learn",
                severity="error" if "b" in group.parts else "warning",
            )


def _rate(facts: TrainingFacts) -> str:
    return "2e-4" if facts.optimizer.adaptive else "0.1"
