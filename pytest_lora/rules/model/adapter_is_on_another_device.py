from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA229", severity="error", needs=ModelFacts)
def adapter_is_on_another_device(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter is not on the device of the weight it adapts.

    ## What it does
    Compares the devices of factors and base weights. A base without weights (meta device), as in a dry run
    or under offloading, is left alone.

    ## Why is this bad?
    The forward pass raises "Expected all tensors to be on the same device", or "Cannot copy out of
    meta tensor": `low_cpu_mem_usage=True` makes adapters without memory, to be filled by a file, and they
    stay empty where no tensor of the file fits.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.from_pretrained
    """
    placed = [layer for layer in facts.layers if layer.base_device not in ("", "meta")]
    astray = [layer for layer in placed if any(part.device != layer.base_device for part in layer.parts)]
    if astray:
        first = astray[0]
        device = next(part.device for part in first.parts if part.device != first.base_device)
        empty = device == "meta"
        yield Violation(
            where=grouped(layer.module for layer in astray),
            observed=f"adapter {first.adapter!r} is on {device}, its base weights are on {first.base_device}"
            + ("; its values were never loaded" if empty else ""),
            expected="each adapter on the device of the weight it adapts",
            fix="low_cpu_mem_usage is only for loading a file whose keys fit; a new adapter is made with "
            "get_peft_model(..., low_cpu_mem_usage=False)"
            if empty
            else f'move the model after the adapter was added: model.to("{first.base_device}")',
        )
