from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA240", severity="error", needs=ModelFacts)
def active_adapter_is_left_out(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """One adapter is merged, and another one that is active is not: it has no effect.

    ## What it does
    Looks for layers into whose base weight an adapter is merged while another adapter is active there and not
    merged, whatever the model is for.

    ## Why is this bad?
    A layer with anything merged into it runs its base weight alone. The other adapter is in the list of
    active ones and does nothing: the output is that of the merged one only.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(["default"])
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(["default", "second"])
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/lora#merge-lora-weights-into-the-base-model
    """
    by_module: dict[str, list[LayerState]] = {}
    for layer in facts.layers:
        by_module.setdefault(layer.module, []).append(layer)
    left_out: dict[tuple[str, str], list[str]] = {}
    for module, layers in by_module.items():
        merged = next((layer.adapter for layer in layers if layer.merged), None)
        for layer in layers:
            if merged is not None and layer.active and not layer.merged and not layer.disabled:
                left_out.setdefault((layer.adapter, merged), []).append(module)
    for (adapter, merged), modules in left_out.items():
        yield Violation(
            where=grouped(modules),
            observed=f"adapter {merged!r} is merged into the base weights of {len(modules)} modules, where {adapter!r} "
            f"is active and not merged: these layers run their base weight alone, without {adapter!r}",
            expected="all active adapters merged, or none",
            fix=f"call model.unmerge_adapter(), or merge {adapter!r} too: merge_adapter([{merged!r}, {adapter!r}])",
        )
