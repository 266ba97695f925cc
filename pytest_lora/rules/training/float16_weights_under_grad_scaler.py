from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import CAST_TRAINED


@rule("LORA308", severity="error", needs=TrainingFacts)
def float16_weights_under_grad_scaler(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """A GradScaler is used with trainable weights in float16.

    ## What it does
    Looks for trainable parameters in float16 while an enabled `GradScaler` is given.

    ## Why is this bad?
    A GradScaler is for float32 weights under autocast; torch raises "Attempting to unscale FP16
    gradients". Adapters get into float16 by `autocast_adapter_dtype=False` on a float16 base, or by
    `model.half()`.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([p for p in model.half().parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    report = check_training(model, batch, optimizer=optimizer, scaler=scaler)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    report = check_training(model, batch, optimizer=optimizer, scaler=scaler)
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/23165
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    half = [t.name for t in facts.tensors if t.trainable and t.held and t.dtype == "float16"]
    if facts.scaler and half:
        yield Violation(
            where=grouped(half),
            observed="trainable weights are float16 and a GradScaler is used: torch cannot unscale FP16 gradients",
            expected="trainable weights in float32 (autocast then computes in float16), or bfloat16 and no scaler",
            fix=f"keep autocast_adapter_dtype, or cast what trains: {CAST_TRAINED}",
        )
