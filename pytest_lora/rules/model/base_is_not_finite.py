from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA208", severity="error", needs=ModelFacts)
def base_is_not_finite(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A weight of the base holds NaN or infinity.

    ## What it does
    Reads the unquantized base parameters (on a CPU at most the first billion numbers).

    ## Why is this bad?
    Every output is NaN, whatever the adapter does. Usual causes are a damaged or partly loaded checkpoint,
    a bfloat16 model cast to float16 (range 65504), and an adapter with NaN that was merged.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("inf")
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://pytorch.org/docs/stable/type_info.html
    """
    if facts.nonfinite_base:
        yield Violation(
            where=grouped(facts.nonfinite_base),
            observed=f"NaN or infinity in {len(facts.nonfinite_base)} base parameters",
            expected="finite base weights",
            fix="load the base again; use bfloat16 or float32 instead of float16 where its values exceed "
            "65504",
        )
