from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import scaled


@rule("LORA101", severity="error", needs=ConfigFacts, on_saved="alone")
def alpha_is_not_positive(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """Alpha is zero or negative, so that the adapter does nothing or the opposite.

    ## What it does
    Looks for adapted modules whose alpha, patterns applied, is not above zero.

    ## Why is this bad?
    The low-rank update is multiplied by `alpha / r`. With alpha zero the output never depends on the
    adapter, its gradients are zero, and the loss stays where it is for the whole run.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=0, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - LoRA, section 4.1: https://arxiv.org/abs/2106.09685
    """
    for alpha in sorted({layer.alpha for layer in facts.layers if layer.alpha <= 0}):
        layers = [layer for layer in facts.layers if layer.alpha == alpha]
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"alpha is {alpha:g}, so the scaling alpha/r is {layers[0].configured_scaling:g}",
            expected="alpha above 0; r to 2 * r is usual",
            fix=advise(
                change("set", **scaled(facts.settings, layers[0].module, 2.0)), ", which gives a scaling of 2"
            ),
        )
