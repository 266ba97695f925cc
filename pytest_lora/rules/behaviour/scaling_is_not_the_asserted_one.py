from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import SAME_SCALING, ModuleScaling, ScalingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA902", severity="error", needs=ScalingFacts)
def scaling_is_not_the_asserted_one(facts: ScalingFacts, expect: Expect) -> Iterator[Violation]:
    """The effective scaling of a module is not the number that a test asserts.

    ## What it does
    Compares `alpha / r`, under rsLoRA `alpha / sqrt(r)`, of every adapted module with the expected number, to
    one part in a million. On a model the scaling is read from each layer.

    ## Why is this bad?
    A scaling left over from another rank changes the size of every update, and with it the learning rate that
    suits.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_alpha_ratio(model, expected=1.0)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_alpha_ratio(model, expected=2.0)
    ```

    ## References
    - https://arxiv.org/abs/2106.09685
    - rsLoRA: https://arxiv.org/abs/2312.03732
    """
    for found in facts.scalings:
        if math.isclose(found.scaling, facts.expected, rel_tol=SAME_SCALING):
            continue
        yield Violation(
            where=found.where,
            observed=_in_words(found),
            expected=f"scaling {facts.expected:g} (expected={facts.expected!r})",
            fix=_fix(found, facts.expected),
        )


def _in_words(found: ModuleScaling) -> str:
    formula = f"alpha {found.alpha:g} / {'sqrt(' if found.use_rslora else ''}rank {found.rank}"
    formula += ")" if found.use_rslora else ""
    if math.isclose(found.scaling, found.configured, rel_tol=SAME_SCALING):
        return f"scaling {found.scaling:g} ({formula})"
    return f"scaling {found.scaling:g}, though {formula} is {found.configured:g}"


def _fix(found: ModuleScaling, expected: float) -> str:
    if math.isclose(found.configured, expected, rel_tol=SAME_SCALING):
        return "undo what changed the scaling (scale_layer, set_scale) with unscale_layer"
    return (
        f"an alpha of {expected * found.divisor:g} (lora_alpha, or alpha_pattern for single modules), "
        f"or expected={found.scaling:g} if this is meant"
    )
