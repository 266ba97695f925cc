from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA223", severity="warning", needs=ModelFacts)
def compute_dtype_differs_from_model(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The 4-bit layers compute in another dtype than the 16-bit model around them.

    ## What it does
    Compares `bnb_4bit_compute_dtype` with the dtype of the unquantized parameters. Float32 around 16-bit
    compute (`prepare_model_for_kbit_training`) and a float32 model throughout are fine.

    ## Why is this bad?
    With float32 compute (the default when none is given) every matrix product of a 16-bit model is cast up
    and runs several times slower. With float16 compute in a bfloat16 model, activations above 65504
    overflow to infinity. QLoRA uses bfloat16.

    ## Example
    ```python
    model = get_peft_model(
        base_4bit.to(torch.bfloat16), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://arxiv.org/abs/2305.14314
    - https://huggingface.co/docs/transformers/quantization/bitsandbytes#compute-data-type
    """
    found = facts.base.quantization
    rest = facts.base.float_dtypes[0] if facts.base.float_dtypes else ""
    if found is None:
        return
    for compute in found.compute_dtypes:
        slow = compute == "float32" and rest in ("bfloat16", "float16")
        overflows = compute == "float16" and rest == "bfloat16"
        if slow or overflows:
            four_bit = [module.name for module in facts.base.modules if module.quantization == "4bit"]
            yield Violation(
                where=grouped(four_bit),
                observed=f"4-bit layers compute in {compute}, the rest of the model is {rest}: "
                + ("every product is slower than in 16 bit" if slow else "values above 65504 overflow"),
                expected=f"one 16-bit dtype: bnb_4bit_compute_dtype=torch.{rest}",
                fix=f"load the base with BitsAndBytesConfig(..., bnb_4bit_compute_dtype=torch.{rest})",
            )
