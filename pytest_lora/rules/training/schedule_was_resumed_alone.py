from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

RESUMED = 10
"""Steps from which on a schedule is taken for that of a run that goes on. Fewer may have been taken by hand, to get
past a warm-up."""


@rule("LORA365", severity="warning", needs=TrainingFacts)
def schedule_was_resumed_alone(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The schedule goes on where a run stopped, and the optimizer begins anew.

    ## What it does
    Looks for a schedule that has counted ten steps or more beside an optimizer of the Adam family that has
    counted none.

    ## Why is this bad?
    Moments and step counters are gone: the first steps go as far as the learning rate allows in the direction of
    single gradients, without the warm-up that a fresh optimizer needs, since the schedule is past it. Where the
    schedule is near its end, nothing more is learned.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": 50, "_step_count": 51})
    report = check_training(model, batch, optimizer=optimizer, scheduler=scheduler)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    report = check_training(model, batch, optimizer=optimizer, scheduler=scheduler)
    ```

    ## References
    - https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html
    """
    schedule, optimizer = facts.schedule, facts.optimizer
    if schedule is None or not optimizer.adam or schedule.steps_taken < RESUMED or not schedule.drives:
        return
    if not optimizer.steps and optimizer.held:
        yield Violation(
            where=f"scheduler ({schedule.schedule}) and optimizer ({optimizer.optimizer})",
            observed=f"the schedule has counted {schedule.steps_taken} steps, the optimizer none: it was resumed "
            "without its state",
            expected="both resumed, or both fresh",
            fix="load the optimizer's state from the same checkpoint (optimizer.pt), or make the schedule anew with a "
            "warm-up of its own",
        )
