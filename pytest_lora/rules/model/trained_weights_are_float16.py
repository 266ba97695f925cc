from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import CAST_TRAINED


@rule("LORA206", severity="error", needs=ModelFacts)
def trained_weights_are_float16(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Trainable adapter weights are stored in float16, or in 8 bits.

    ## What it does
    Looks for trainable factors, `modules_to_save` copies and token rows in float16 or a float8 type. Frozen
    ones and bfloat16 are fine.

    ## Why is this bad?
    Mixed precision raises "Attempting to unscale FP16 gradients". Without it, the epsilon of Adam
    (1e-8) is zero in float16 and most updates are rounded away: the loss turns NaN or stands still. PEFT
    keeps LoRA factors in float32 by itself, but not `modules_to_save`, and `model.half()` or
    `autocast_adapter_dtype=False` undoes it.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.half()
    report = check_model(model)
    ```

    ## Use instead
    ```python
    base = base.half()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#valueerror-attempting-to-unscale-fp16-gradients
    - https://github.com/huggingface/peft/issues/341
    """
    if expect.purpose != "train":
        return
    factors = [
        layer for layer in facts.layers if any(f.trainable and _is_narrow(f.dtype) for f in layer.parts)
    ]
    others = [part for part in facts.kept if part.trainable and _is_narrow(part.dtype)]
    if factors or others:
        dtypes = {f.dtype for layer in factors for f in layer.parts} | {part.dtype for part in others}
        narrow = ", ".join(sorted(filter(_is_narrow, dtypes)))
        yield Violation(
            where=grouped([*(layer.module for layer in factors), *(part.module for part in others)]),
            observed=f"trainable weights are {narrow}: {len(factors)} LoRA layers, {len(others)} saved copies",
            expected="trained weights in float32 (or bfloat16), whatever the dtype of the frozen base",
            fix=(
                ""
                if others
                else "convert the base before get_peft_model, not after, and keep "
                "autocast_adapter_dtype; here "
            )
            + f"cast what trains: {CAST_TRAINED}",
        )


def _is_narrow(dtype: str) -> bool:
    return dtype == "float16" or dtype.startswith("float8")
