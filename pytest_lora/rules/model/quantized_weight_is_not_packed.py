from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA222", severity="error", needs=ModelFacts)
def quantized_weight_is_not_packed(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A quantized layer still holds unpacked weights.

    ## What it does
    Looks for bitsandbytes layers whose weight was never quantized although it is on a real device.

    ## Why is this bad?
    bitsandbytes packs a weight when it is moved to its device. Without that, the layer keeps its 16- or
    32-bit memory and fails, or quantizes anew, at its first forward pass.

    ## Example
    ```python
    import bitsandbytes as bnb
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    model.base_model.model.model.layers[1].mlp.down_proj = layer.requires_grad_(False)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/bitsandbytes/reference/nn/linear4bit
    """
    found = facts.base.quantization
    if found is not None and found.unpacked:
        yield Violation(
            where=grouped(found.unpacked),
            observed=f"{len(found.unpacked)} quantized layers hold weights that were never packed",
            expected="packed weights with their quantization state",
            fix="move the layers to their device once, which packs them: "
            f"model.to({next(iter(facts.base.device_types), 'cuda')!r})",
        )
