from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, LayerFacts
from pytest_lora.facts.settings import Settings, alpha_divisor
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA108", severity="warning", needs=ConfigFacts, on_saved="alone")
def scaling_differs_between_modules(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """Patterns give the modules of one adapter very different scalings.

    ## What it does
    Compares the largest with the smallest effective scaling among the modules of an adapter that uses
    `rank_pattern` or `alpha_pattern`; above `Expect.max_scaling_spread` it warns.

    ## Why is this bad?
    `rank_pattern` changes the rank alone. Without the matching `alpha_pattern` the modules with the
    larger rank get the smaller scaling and learn least, the opposite of what a larger rank is for.

    ## Example
    ```python
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 40})
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 40},
        alpha_pattern={"down_proj": 80},
    )
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/axolotl-ai-cloud/axolotl/issues/3673
    """
    positive = [layer for layer in facts.layers if layer.scaling > 0]
    if not positive or not facts.patterns:
        return
    low = min(positive, key=lambda layer: layer.scaling)
    high = max(positive, key=lambda layer: layer.scaling)
    spread = high.scaling / low.scaling
    patterned = {module for pattern in facts.patterns for module in pattern.decides}
    odd, usual = (low, high) if low.module in patterned else (high, low)
    if spread > expect.max_scaling_spread:
        yield Violation(
            where=grouped(layer.module for layer in positive if layer.scaling == odd.scaling),
            observed=f"r={odd.rank} with alpha={odd.alpha:g} gives a scaling of {odd.scaling:.3g}; "
            f"{usual.leaf} has {usual.scaling:.3g}, a factor of {spread:.0f}",
            expected=f"scalings within a factor of {expect.max_scaling_spread:g} in one adapter",
            fix=advise("let alpha follow the rank: ", _alpha(facts.settings, odd, usual.scaling)),
        )


def _alpha(settings: Settings, layer: LayerFacts, scaling: float) -> Change:
    key = settings.alpha_key(layer.module) or settings.rank_key(layer.module) or layer.leaf
    alpha = scaling * alpha_divisor(layer.rank, rslora=layer.use_rslora)
    return change(alpha_pattern={**dict(settings.alpha_pattern), key: alpha})
