from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA221", severity="error", needs=ModelFacts)
def base_is_not_quantized(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The model declares 4-bit or 8-bit weights, but no layer is quantized so.

    ## What it does
    Compares the `quantization_config` with the layers that are there. Models without weights (meta device)
    are left alone.

    ## Why is this bad?
    Memory is that of the 16- or 32-bit model, and code that looks at the declaration (PEFT, Trainer, this
    one's users) treats plain weights as quantized.

    ## Example
    ```python
    base.config.quantization_config = {"load_in_4bit": True}
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/transformers/quantization/bitsandbytes
    """
    found = facts.base.quantization
    if found is None or found.declared is None or "meta" in facts.base.device_types:
        return
    linear = [module for module in facts.base.modules if module.is_linear]
    quantized = {module.quantization for module in facts.base.modules if module.quantization}
    if quantized and quantized < {"4bit", "8bit"} and found.declared not in quantized:
        other = quantized.pop()
        yield Violation(
            where=grouped(module.name for module in facts.base.modules if module.quantization),
            observed=f"the model says that it is loaded in {found.declared}, but its layers are quantized to {other}",
            expected=f"linear layers of {found.declared} weights",
            fix=f"load the base anew with the quantization that is meant; for {other} weights declare load_in_{other}",
        )
    elif not quantized:
        halves = [dtype for dtype in facts.base.float_dtypes[:1] if dtype in ("bfloat16", "float16")]
        compute = f", bnb_4bit_compute_dtype=torch.{halves[0]}" if halves and found.declared == "4bit" else ""
        yield Violation(
            where=grouped(module.name for module in linear) if linear else facts.base.architecture,
            observed=f"the model says that it is loaded in {found.declared}, but 0 of {len(linear)} linear "
            "layers are quantized",
            expected=f"linear layers of {found.declared} weights",
            fix="load the base with from_pretrained(..., quantization_config=BitsAndBytesConfig("
            f"load_in_{found.declared}=True{compute})); setting it afterwards quantizes nothing",
        )
