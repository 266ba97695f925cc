from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TRIED_OUT, TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA329", severity="warning", needs=TrainingFacts)
def warm_up_outlasts_training(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The warm-up is as long as the training it is for.

    ## What it does
    Compares the numbers that a schedule of transformers was made with: `num_warmup_steps` and
    `num_training_steps`. Below 20 training steps it is likely that a recipe is only tried out, and an info
    unless the losses so far have not fallen.

    ## Why is this bad?
    The learning rate never gets to what was set. Its mean is half of it at most, and an adapter that needs
    1e-4 is trained at a fraction of that. It comes from warm-up steps of a recipe for more data, or from
    counting them in micro-batches and training in optimizer steps.

    ## Example
    ```python
    from transformers import get_cosine_schedule_with_warmup
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1000, num_training_steps=100)
    report = check_training(model, batch, optimizer=optimizer, scheduler=scheduler)
    ```

    ## Use instead
    ```python
    from transformers import get_cosine_schedule_with_warmup
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=100)
    report = check_training(model, batch, optimizer=optimizer, scheduler=scheduler)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/optimizer_schedules
    """
    schedule = facts.schedule
    if schedule is None or not schedule.warm_up or schedule.planned is None:
        return
    if schedule.warm_up >= schedule.planned > 0:
        yield Violation(
            where=f"scheduler ({schedule.schedule})",
            observed=f"the warm-up takes {schedule.warm_up} steps of a training of {schedule.planned}: the learning "
            "rate never gets to the one that was set",
            expected="a warm-up over 3 to 10 % of the optimizer steps",
            fix=f"set num_warmup_steps={max(1, schedule.planned // 20)}, and count both in optimizer steps",
            severity=None if schedule.planned >= TRIED_OUT or facts.history_is_flat else "info",
        )
