from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import CAST_TRAINED


@rule("LORA309", severity="error", needs=TrainingFacts)
def float16_weights_under_adam(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Adam trains weights in float16, where its eps is zero.

    ## What it does
    Looks for trainable float16 parameters under an optimizer of the Adam family without a GradScaler.

    ## Why is this bad?
    Adam divides by a root plus `eps=1e-8`. In float16 that eps rounds to zero, the square of a small
    gradient too, and 0 / 0 is NaN: the first loss is fine and every later one is NaN. What does not
    become NaN loses its small updates to rounding.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.half().parameters() if p.requires_grad], lr=1e-3)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.float().parameters() if p.requires_grad], lr=1e-3)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/25021
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    half = [t.name for t in facts.tensors if t.trainable and t.held and t.dtype == "float16"]
    if facts.scaler or not half or not facts.optimizer.adaptive or not facts.steps:
        return
    eps = max((g.eps for g in facts.optimizer.groups if g.eps is not None), default=None)
    underflows = eps is not None and eps < SMALLEST / 2
    broken = not facts.finite
    if broken or underflows:
        observed = f"trainable weights are float16 under {facts.optimizer.optimizer}" + (
            f" with eps={eps:g}, which is zero in float16" if underflows else ""
        )
        yield Violation(
            where=grouped(half),
            observed=f"{observed}: the loss or the gradients {'became' if broken else 'will become'} NaN",
            expected="trainable weights in float32 or bfloat16",
            fix=f"keep autocast_adapter_dtype, or cast what trains: {CAST_TRAINED}",
            severity=None if broken else "warning",
        )


SMALLEST = 2.0**-24
"""The smallest float16 above zero; what is not above half of it rounds to zero."""
