from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, LayerFacts
from pytest_lora.facts.settings import Settings
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import scaled


@rule("LORA103", severity="warning", needs=ConfigFacts, on_saved="alone")
def alpha_blows_up_the_adapter(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The scaling is so large that training will diverge at usual learning rates.

    ## What it does
    Looks for adapted modules whose effective scaling is above `Expect.max_scaling`. Under rsLoRA, where alpha is at
    least the rank, that limit falls with the square root of the rank to `Expect.max_scaling_rslora`: at rank 1 the
    two are the same mathematics, and the update grows with that root above it.

    ## Why is this bad?
    The scaling multiplies update and gradients. An alpha that was left from a larger rank, or chosen as
    a multiple of the rank although rsLoRA divides by its square root only, makes the first steps
    overshoot.

    ## Example
    ```python
    config = LoraConfig(r=4, lora_alpha=256, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - rsLoRA: https://arxiv.org/abs/2312.03732
    """
    loud = [layer for layer in facts.layers if layer.scaling > _limit(layer, expect)]
    for scaling in sorted({layer.scaling for layer in loud}):
        layers = [layer for layer in loud if layer.scaling == scaling]
        rank, alpha, rslora = layers[0].rank, layers[0].alpha, layers[0].use_rslora
        divisor = f"sqrt({rank})" if rslora else str(rank)
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"r={rank} with alpha={alpha:g}: the scaling is {alpha:g}/{divisor} = {scaling:.3g}",
            expected=f"a scaling of at most {_limit(layers[0], expect):g}",
            fix=_fix(facts.settings, layers[0]),
        )


def _fix(settings: Settings, layer: LayerFacts) -> Advice:
    if layer.use_rslora and layer.rank > 1:  # 16 keeps the scaling at 11.3 or less from rank 2 on
        fields = scaled(settings, layer.module, 16 / layer.rank**0.5)
        return advise("keep alpha near 16 under rsLoRA, whatever the rank: ", change(**fields))
    return advise(change("set", **scaled(settings, layer.module, 2.0)), ", which gives a scaling of 2")


def _limit(layer: LayerFacts, expect: Expect) -> float:
    chosen_for_plain_lora = layer.use_rslora and layer.alpha >= layer.rank
    if not chosen_for_plain_lora:
        return expect.max_scaling
    return max(expect.max_scaling_rslora, expect.max_scaling / math.sqrt(layer.rank))
