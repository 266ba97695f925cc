from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule

HALF = {"float16", "bfloat16"}


@rule("LORA238", severity="warning", needs=ModelFacts)
def base_mixes_half_dtypes(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The base holds float16 and bfloat16 weights side by side.

    ## What it does
    Looks for both among the unquantized parameters. One of them beside float32 is usual.

    ## Why is this bad?
    A product of the two raises, or goes through float32 and the next layer raises: "expected scalar type Half but
    found BFloat16". It happens where a part is cast by hand after the model was loaded in the other dtype.

    ## Example
    ```python
    base = base.to(torch.bfloat16)
    base.model.norm.half()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    base = base.to(torch.bfloat16)
    base.model.norm.float()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/model#model-instantiation-dtype
    - https://github.com/hiyouga/LlamaFactory/issues/291
    """
    if set(facts.base.float_dtypes) >= HALF:
        most = next(dtype for dtype in facts.base.float_dtypes if dtype in HALF)
        other = (HALF - {most}).pop()
        yield Violation(
            where=facts.base.architecture,
            observed=f"base weights are {most}, and some are {other}",
            expected="one 16-bit dtype in the base",
            fix=f"load the base in one dtype and cast no part of it to {other}, or cast all of it, "
            f"base.to(torch.{most}), before get_peft_model",
        )
