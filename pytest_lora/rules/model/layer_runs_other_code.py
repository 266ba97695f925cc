from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA244", severity="warning", needs=ModelFacts)
def layer_runs_other_code(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A LoRA layer is of another class than PEFT's, or its forward was replaced.

    ## What it does
    Looks for LoRA layers whose class is defined outside PEFT, and for those with a `forward` of their own. Classes that
    the configuration registers for custom modules, the hooks of accelerate and X-LoRA's forward are no finding.

    ## Why is this bad?
    PEFT merges by its own formula, and a saved adapter is loaded into PEFT's own layers: what the other code
    adds (a gate, another scaling, a nonlinearity) is trained with and is gone after merging or loading.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.forward = lambda x, forward=module.forward: torch.tanh(forward(x))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/custom_models
    """
    if facts.trains_xlora:
        return
    found: dict[str, list[str]] = {}
    for layer in facts.layers:
        if layer.own_code:
            found.setdefault(layer.own_code, []).append(layer.module)
    for code, modules in found.items():
        seen = (
            "their forward was replaced" if code == "forward" else f"they are of {code}, which is not PEFT's"
        )
        yield Violation(
            where=grouped(dict.fromkeys(modules)),
            observed=f"LoRA layers that do not run PEFT's code: {seen}. Merging and reloading follow PEFT's formula "
            "and leave out what this code does",
            expected="PEFT's own layers, or a class that is registered for custom modules",
            fix="register the class with config._register_custom_module(...) before the adapter is made and loaded, or "
            "put what it does into modules of its own; compare with assert_merge_exact and assert_reload_exact",
        )
