from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import OptimizerFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import optimizer_anew


@rule("LORA364", severity="warning", needs=OptimizerFacts)
def optimizer_state_is_of_another_adapter(facts: OptimizerFacts, expect: Expect) -> Iterator[Violation]:
    """The optimizer's state was made by training another adapter.

    ## What it does
    Looks for factors that are all zero although the optimizer has counted steps for them and keeps a running average
    of gradients (`exp_avg`) that is not zero, and for averages of another shape (an error: the step raises).

    ## Why is this bad?
    The state was loaded, the adapter was not: it was made anew, or another file was read. The first steps then follow
    gradients of another adapter with step counters of a run that never was, and the loss jumps.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    model.zero_grad()
    report = check_model(model, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    model.zero_grad()
    report = check_model(model, optimizer=optimizer)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.load_state_dict.html
    """
    fix = "load the adapter of the same checkpoint too, before the optimizer is made, or begin with a fresh "
    fix += f"optimizer: {optimizer_anew(2e-4)}"
    if facts.unmoved and not facts.misshapen:
        yield Violation(
            where=grouped(_module(name) for name in facts.unmoved),
            observed=f"{len(facts.unmoved)} factors are all zero, and {facts.optimizer} has counted {facts.steps} "
            "steps for them with moments (exp_avg) other than zero: a step would have moved them, so its state "
            "belongs to another adapter",
            expected="the optimizer state that was saved with this adapter",
            fix=fix,
        )
    if facts.misshapen:
        first = facts.misshapen[0]
        yield Violation(
            where=grouped(_module(one.name) for one in facts.misshapen),
            observed=f"the moments (exp_avg) of {len(facts.misshapen)} parameters have another shape, such as "
            f"{first.average} for {first.shape}: the optimizer state belongs to an adapter of another rank or other "
            "target modules",
            expected="the optimizer state that was saved with this adapter",
            fix=fix,
            severity="error",
        )


def _module(name: str) -> str:
    return name.partition(".lora_")[0].removeprefix("base_model.model.")
