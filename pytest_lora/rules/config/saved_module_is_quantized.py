from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA123", severity="error", needs=ConfigFacts)
def saved_module_is_quantized(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A module in modules_to_save is quantized and cannot be trained in full.

    ## What it does
    Looks for quantized layers inside the modules that `modules_to_save` copies.

    ## Why is this bad?
    Packed integers have no gradients: PEFT stops with "only Tensors of floating point dtype can require
    gradients".

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["down_proj"])
    report = check_config(config, base_4bit)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    report = check_config(config, base_4bit)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/quantization
    """
    saved = [m for m in facts.base.modules if m.quantization and facts.keeps(m.name)]
    if saved:
        yield Violation(
            where=grouped(m.name for m in saved),
            observed=f"modules_to_save copies layers that are quantized to {saved[0].quantization}",
            expected="float weights in every module that is trained in full",
            fix="target them with LoRA instead, or leave them unquantized "
            f"(llm_int8_skip_modules=[{saved[0].leaf!r}])",
        )
