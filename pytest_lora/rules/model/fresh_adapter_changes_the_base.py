from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA227", severity="warning", needs=ModelFacts)
def fresh_adapter_changes_the_base(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter that should be fresh already changes the model.

    ## What it does
    Under `Expect(fresh=True)`: looks for modules with a product other than zero though their initialisation
    starts at zero. PiSSA, OLoRA, LoftQ, CorDA, orthogonal and `init_lora_weights=False` start elsewhere by
    design.

    ## Why is this bad?
    The first loss is not that of the base. Either an adapter was loaded or trained before, or its values
    were overwritten.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    report = check_model(model, expect=Expect(fresh=True))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model, expect=Expect(fresh=True))
    ```

    ## References
    - https://arxiv.org/abs/2106.09685
    """
    if expect.fresh is not True:
        return
    at_zero = {c.adapter for c in facts.configs if c.settings.init_lora_weights in STARTS_AT_ZERO}
    changed = [layer for layer in facts.active_layers if layer.adapter in at_zero and layer.changes_output]
    if changed:
        yield Violation(
            where=grouped(layer.module for layer in changed),
            observed=f"adapter {changed[0].adapter!r} is not at zero in {len(changed)} of "
            f"{len(facts.active_layers)} modules",
            expected="a fresh adapter that leaves the base as it is",
            fix="make a new adapter on a newly loaded base; or, if this one has been trained, say Expect(fresh=None)",
        )


STARTS_AT_ZERO = (True, "gaussian", "eva", "mica")
"""Values of ``init_lora_weights`` under which the product of the factors starts at zero."""
