from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

NEED_FLOATS = ("pissa", "corda", "loftq", "orthogonal")
READ_WEIGHTS = ("pissa", "corda", "loftq", "olora", "orthogonal", "lora_ga", "mica")


@rule("LORA115", severity="error", needs=ConfigFacts)
def init_does_not_fit_the_weights(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The initialisation computes with base weights that are quantized, or that it cannot find.

    ## What it does
    Looks for `init_lora_weights` of PiSSA, CorDA, LoftQ or the orthogonal one on modules that are already
    quantized, and of any method that reads the base weight on fused parameters (`target_parameters`).

    ## Why is this bad?
    These methods decompose the float weight. On packed weights PEFT raises (PiSSA, CorDA, orthogonal), or computes with
    numbers that are no weights (LoftQ, which wants to quantize by itself); on a fused parameter it raises.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    report = check_config(config, base_4bit)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1929
    - https://huggingface.co/docs/peft/developer_guides/lora#initialization
    """
    init = str(facts.settings.init_lora_weights).lower()
    if facts.live:
        return
    if init.startswith(NEED_FLOATS):
        quantized = {m.name: m.quantization for m in facts.base.modules if m.quantization}
        hit = [layer.module for layer in facts.layers if layer.module in quantized]
        if hit:
            yield Violation(
                where=grouped(hit),
                observed=f"init_lora_weights={init!r} on weights that are already quantized to {quantized[hit[0]]}",
                expected=f"float weights for {init}",
                fix=advise(
                    "initialise on the 16-bit base and quantize what is left of it, or ",
                    change("set", init_lora_weights=True),
                    ", the default",
                ),
            )
    if init.startswith(READ_WEIGHTS):
        fused = [layer.module for layer in facts.layers if layer.kind == "Parameter"]
        if fused:
            yield Violation(
                where=grouped(fused),
                observed=f"init_lora_weights={init!r} on fused parameters, which have no weight of a layer to read",
                expected="the default initialisation on target_parameters",
                fix=advise(change("set", init_lora_weights=True), ", the default"),
            )
