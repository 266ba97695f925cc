from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA307", severity="error", needs=TrainingFacts)
def gradients_are_clipped_away(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Clipping leaves nothing of the gradients.

    ## What it does
    Looks for `max_grad_norm=0`, and for one so small that Adam's eps outweighs what is left, or that
    plain SGD keeps less than a ten-thousandth of its gradient.

    ## Why is this bad?
    `torch.nn.utils.clip_grad_norm_` with 0 multiplies every gradient by zero. (The Trainer of
    transformers reads `max_grad_norm=0` as "do not clip"; a hand-written loop does not.)

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, max_grad_norm=0.0)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, max_grad_norm=1.0)
    ```

    ## References
    - https://pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html
    """
    limit = facts.max_grad_norm
    norms = [s.gradient_norm for s in facts.steps if s.gradient_norm and math.isfinite(s.gradient_norm)]
    if limit is None or not facts.steps:
        return
    if limit == 0:
        yield Violation(
            where="max_grad_norm",
            observed="max_grad_norm=0: every gradient is clipped to zero",
            expected="a positive norm such as 1.0, or no clipping",
            fix="set max_grad_norm=1.0, or do not clip: max_grad_norm=None",
        )
    elif norms and limit < min(norms) and _drowns(facts, limit, max(norms)):
        yield Violation(
            where="max_grad_norm",
            observed=f"gradients of norm {max(norms):.3g} are clipped to {limit:g}: next to nothing is left",
            expected="a norm about as large as the usual gradient, such as 1.0",
            fix="set max_grad_norm=1.0",
            severity="warning",
        )


def _drowns(facts: TrainingFacts, limit: float, norm: float) -> bool:
    if not facts.optimizer.adam:
        return facts.optimizer.plain and limit < 1e-4 * norm
    numbers = sum(t.numbers for t in facts.tensors if t.held and t.trainable)
    eps = max((g.eps for g in facts.optimizer.groups if g.eps), default=1e-8)
    return limit / math.sqrt(max(1, numbers)) < eps
