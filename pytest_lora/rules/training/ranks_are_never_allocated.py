from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.rules import Violation, rule

CALLBACK = (
    "class AllocateRanks(TrainerCallback): on_optimizer_step = lambda self, args, state, control, model, **_: "
    "model.base_model.update_and_allocate(state.global_step)"
)
"""What transformers' ``Trainer`` needs, which calls it between ``optimizer.step()`` and ``zero_grad()``."""


@rule("LORA348", severity="warning", needs=OptimizerFacts)
def ranks_are_never_allocated(facts: OptimizerFacts, expect: Expect) -> Iterator[Violation]:
    """AdaLoRA trains, and nothing ever calls what divides its ranks among the modules.

    ## What it does
    Compares the steps that the optimizer has counted with the step at which AdaLoRA begins to take ranks away
    (`tinit + deltaT`), where its allocator has not seen a single step.

    ## Why is this bad?
    Every module keeps `init_r`: the run is a LoRA of a higher rank with a penalty. The training loop has to call
    `update_and_allocate`. Nothing does it by itself: neither the trainers of transformers and TRL nor Lightning's nor
    PEFT. Under a `Trainer`, a callback of three lines does:

        class AllocateRanks(TrainerCallback):
            def on_optimizer_step(self, args, state, control, model, **kwargs):
                model.base_model.update_and_allocate(state.global_step)

    ## Example
    ```python
    from peft import AdaLoraConfig

    config = AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=1, deltaT=1, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        model.zero_grad()
    report = check_model(model, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    from peft import AdaLoraConfig

    config = AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=1, deltaT=1, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    report = check_model(model, optimizer=optimizer)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/adalora
    - https://github.com/huggingface/peft/issues/1801
    """
    begins = facts.allocation_begins
    if begins is not None and facts.steps > begins:
        yield Violation(
            where="AdaLoRA's rank allocator",
            observed=f"{facts.optimizer} has counted {facts.steps} steps, and update_and_allocate was never called: "
            f"ranks were to be taken away from step {begins} on (tinit + deltaT), and all still are init_r",
            expected="a call at every step, between optimizer.step() and zero_grad()",
            fix="let the loop call update_and_allocate of the tuner (model.base_model) with the number of the step, "
            "after each step of the optimizer and before the gradients are cleared; no trainer does it by itself, so "
            f"under transformers' or TRL's add an instance of this callback: {CALLBACK}",
        )
