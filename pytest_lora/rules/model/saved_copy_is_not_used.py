from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA211", severity="error", needs=ModelFacts)
def saved_copy_is_not_used(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The forward pass goes around the modules_to_save copy of the active adapter.

    ## What it does
    Compares which adapter is active in the LoRA layers with the one active in the `modules_to_save`
    wrappers, and looks for copies of adapters that were deleted from the LoRA layers alone, or that are not active
    while another adapter without a copy is (a warning).

    ## Why is this bad?
    The wrapper runs the original module, or the copy of another adapter, so that adapter and head do not
    belong together: the copy gets no gradient, and what is evaluated is not what is saved.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    head = model.base_model.model.lm_head
    head.enable_adapters(False)
    head.modules_to_save["default"].requires_grad_(True)
    head.original_module.requires_grad_(False)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.set_adapter
    """
    left = [copy for copy in facts.saved if copy.is_orphaned and copy.active]
    if left:
        yield Violation(
            where=grouped(copy.module for copy in left),
            observed=f"the modules_to_save copy of adapter {left[0].adapter!r} is active, and there is no such adapter "
            "any more: it was deleted from the LoRA layers and the configurations alone",
            expected="a copy of an adapter that the model has, or the module of the base",
            fix=f"call model.set_adapter({facts.adapters[0]!r}) on the PEFT model, which switches both, and whose own "
            "delete_adapter takes the copy along"
            if facts.adapters
            else "load the adapter anew",
        )
        return
    enabled = {layer.adapter for layer in facts.layers if layer.active and not layer.disabled}
    unused = [copy for copy in facts.saved if copy.adapter in enabled and not copy.active]
    foreign = [
        copy
        for copy in facts.saved
        if copy.active and copy.adapter in facts.adapters and copy.adapter not in enabled and enabled
    ]
    if foreign and not unused:
        active = sorted(enabled)[0]
        yield Violation(
            where=grouped(copy.module for copy in foreign),
            observed=f"the modules_to_save copy of adapter {foreign[0].adapter!r} is active, and that adapter is not: "
            f"the layers apply {active!r}, which has no copy of its own here",
            expected=f"the module of the base, which {active!r} was trained with",
            fix=f"call model.set_adapter({active!r}) on the PEFT model, which switches both",
            severity="warning",
        )
    if unused:
        state = "disabled" if unused[0].disabled else "not active"
        yield Violation(
            where=grouped(copy.module for copy in unused),
            observed=f"the modules_to_save copy of adapter {unused[0].adapter!r} is {state}, while the "
            "adapter itself is active",
            expected="adapter and modules_to_save of one name active together",
            fix="call model.base_model.enable_adapter_layers(), which enables both"
            if unused[0].disabled
            else f"call model.set_adapter({unused[0].adapter!r}) on the PEFT model, which switches both",
        )
