from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import MergeFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

LOST_TO_QUANTIZATION = 0.5
"""Share of the adapter's own effect that a merge may lose: beyond it the merged model is nearer to the base than to
the adapter."""


@rule("LORA916", severity="warning", needs=MergeFacts)
def merging_requantizes_the_base(facts: MergeFacts, expect: Expect) -> Iterator[Violation]:
    """Merging into quantized weights rounds them to their grid once more.

    ## What it does
    Compares what the merge changes with what the adapter changes. Where more than half of that is lost to
    rounding it is a warning, else an info.

    ## Why is this bad?
    The update of an adapter is small beside the steps of a 4-bit grid. Merged there, much of it disappears.

    ## Example
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-4)
    report = check_merge(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_merge(model, batch)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2321
    """
    if not facts.quantized or facts.refusal is not None:
        return
    # A fresh adapter has no effect yet that could be lost.
    share = facts.apart / facts.effect if facts.effect else 0.0
    own = f"moves it by {facts.effect:.3g} ({share:.0%})" if facts.effect else "does not move it yet"
    yield Violation(
        where=grouped(facts.quantized),
        observed="merging rounds the weights to the quantized grid again: the output moves by up to "
        f"{facts.apart:.3g}, where the adapter itself {own}",
        expected="a merge that loses little of what the adapter does",
        fix="dequantize the base or load it in bfloat16, merge there, and quantize the result if need be",
        severity="warning" if share > LOST_TO_QUANTIZATION else "info",
    )
