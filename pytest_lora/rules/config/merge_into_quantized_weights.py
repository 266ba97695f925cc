from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA130", severity="warning", needs=ConfigFacts, on_saved="with_base")
def merge_into_quantized_weights(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is going to be merged into quantized weights.

    ## What it does
    Needs `Expect(will_merge=True)`. Looks for adapted modules that are quantized.

    ## Why is this bad?
    Merging adds the update to the dequantized weight and quantizes again. The rounding is as large as
    the update itself in places, so that the merged model is not the one that was trained.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base_4bit, expect=Expect(will_merge=True))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base, expect=Expect(will_merge=True))
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1043
    - https://github.com/huggingface/peft/issues/2321
    """
    if not expect.will_merge:
        return
    quantized = {m.name: m.quantization for m in facts.base.modules if m.quantization}
    hit = [layer.module for layer in facts.layers if layer.module in quantized]
    if hit:
        yield Violation(
            where=grouped(hit),
            observed=f"the adapter is to be merged into weights quantized to {quantized[hit[0]]}",
            expected="16-bit base weights to merge into",
            fix="save the adapter, load the base in 16 bit, put the adapter on it and merge there",
        )
