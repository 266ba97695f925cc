from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA317", severity="error", needs=TrainingFacts)
def scheduler_drives_another_optimizer(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The scheduler sets the learning rate of another optimizer than the one that trains.

    ## What it does
    Looks whether the scheduler holds any parameter group of the optimizer, by identity.

    ## Why is this bad?
    A scheduler keeps the optimizer it was made with. After the optimizer was made anew, as it has to be when
    an adapter was added, the schedule goes on without effect: no warm-up and no decay.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
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
    - https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate
    """
    if facts.schedule is not None and not facts.schedule.drives:
        anew = f", scheduler = {facts.schedule.call}" if facts.schedule.call else ""
        yield Violation(
            where=f"scheduler ({facts.schedule.schedule})",
            observed="the scheduler belongs to another optimizer: it sets the learning rate of that one, and the "
            f"{facts.optimizer.optimizer} that trains keeps its own",
            expected="a scheduler made from the optimizer that trains",
            fix=f"make the scheduler anew from the optimizer that trains{anew}, and again whenever that is made anew",
        )
