from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA315", severity="error", needs=TrainingFacts)
def adapter_does_not_move(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Gradients arrive, the optimizer steps, and the adapter stays what it was.

    ## What it does
    Looks for adapter tensors that the optimizer holds, that got a gradient at a learning rate above zero,
    and that no step changed.

    ## Why is this bad?
    Then the update is smaller than the weights can hold (bfloat16 keeps three digits), or the optimizer's
    step does not reach these tensors, as with a wrapper that skips it.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    class Skipping(torch.optim.SGD):
        def step(self, closure=None):
            return None

    report = check_training(model, batch, optimizer=Skipping(model.parameters(), lr=0.1))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    ```

    ## References
    - https://arxiv.org/abs/2010.06192
    """
    held = [t for t in facts.adapter_tensors if t.held and t.reached]
    if not held or facts.some_rate_is_zero or facts.scaler or facts.max_grad_norm == 0 or not facts.finite:
        return
    moved = any(t.moved for t in held)
    still = [t for t in held if not t.moved]
    if not moved:
        yield Violation(
            where=grouped(t.name for t in still),
            observed=f"{len(facts.steps)} steps at a learning rate of "
            f"{max(facts.steps[-1].rates):g} changed nothing",
            expected="tensors that move with every step",
            fix="raise the learning rate, keep trainable weights in float32, and look at what optimizer.step does",
        )
