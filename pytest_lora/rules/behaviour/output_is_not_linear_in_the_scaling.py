from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import LawFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA932", severity="error", needs=LawFacts)
def output_is_not_linear_in_the_scaling(facts: LawFacts, expect: Expect) -> Iterator[Violation]:
    """The effect of an adapter is not proportional to its scaling.

    ## What it does
    Doubles the scaling of each layer, and compares its effect with twice the effect. DoRA is left out.

    ## Why is this bad?
    Scaling an adapter up or down, combining adapters and merging all rest on this law.

    ## Example
    ```python
    from unittest.mock import patch

    from peft.tuners.lora import Linear

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    forward = Linear.forward


    def changed(layer, x, *args, **kwargs):
        plain, out = layer.base_layer(x), forward(layer, x, *args, **kwargs)
        return out if layer.merged or layer.disable_adapters else plain + (out - plain) * layer.scaling["default"]


    with patch.object(Linear, "forward", changed):
        report = check_lora_laws(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    report = check_lora_laws(model, batch)
    ```

    ## References
    - https://arxiv.org/abs/2106.09685
    """
    if facts.nonlinear:
        off = max(off for _, off in facts.nonlinear)
        yield Violation(
            where=grouped(name for name, _ in facts.nonlinear),
            observed=f"twice the scaling changes the effect by another factor, off by up to {off:.3g}",
            expected="an effect that is twice as large",
            fix="look for a nonlinearity or a clamp between lora_A and lora_B",
        )
