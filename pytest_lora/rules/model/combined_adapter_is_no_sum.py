from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import CombinedAdapter, ModelFacts
from pytest_lora.rules import Violation, rule

MOST_MISSED = 0.1
"""What an update may be away from the difference, over its length. Measured on random factors: 1.02 for a weight of
-1 beside 1, 0.63 for one of -0.2; of factors that are as they should be, rounding."""


@rule("LORA258", severity="warning", needs=ModelFacts)
def combined_adapter_is_no_sum(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter that was combined of others acts with another strength than they do.

    ## What it does
    Looks for adapters whose factors are a sum of those of others, as `add_weighted_adapter` makes it (`linear` and
    `cat`), where the configuration still says rsLoRA, DoRA, KaSA or `lora_bias`; and for those of which `linear` took
    an adapter off (a negative weight), where the update is more than a tenth away from that difference.

    ## Why is this bad?
    The sum holds the scaling of its sources already. Under rsLoRA it is multiplied by `sqrt(r)` once more; the
    magnitudes of DoRA and the biases of the sources are not in it at all. One adapter combined with the weight 1 then
    gives another output than itself. `linear` sums each factor by itself, so that the update also has products of
    one adapter's `lora_B` with another's `lora_A` in it: what was to be taken off is not.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_weighted_adapter(["default"], [1.0], "combined", combination_type="linear")
    report = check_model(model)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_weighted_adapter(["default"], [1.0], "combined", combination_type="linear")
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/3761
    - https://github.com/huggingface/peft/issues/3004
    """
    for combined in facts.combined:
        if combined.subtracted and combined.missed > MOST_MISSED:
            off = ", ".join(map(repr, combined.subtracted))
            yield Violation(
                where=f"adapter {combined.adapter!r}",
                observed=f"{combined.adapter!r} is to be {', '.join(map(repr, combined.sources))} with {off} taken "
                f"off, and its update is {combined.missed:.0%} of that difference away from it: each factor was "
                "summed by itself",
                expected="the difference of the updates",
                fix="combine them with combination_type='cat', whose update is the weighted sum of theirs",
            )
        if not combined.kinds:
            continue
        yield Violation(
            where=f"adapter {combined.adapter!r}",
            observed=f"{combined.adapter!r} is a sum of the factors of {', '.join(map(repr, combined.sources))}, "
            f"and {_lost(combined)}",
            expected="a combined adapter that does what its sources do together",
            fix="activate the sources together (set_adapter of the tuner takes a list of names), or merge one after "
            "the other into the base, each with its weight. A sum of rsLoRA adapters is right once its scaling is 1 "
            "and neither its configuration nor its layers ask for rsLoRA",
        )


def _lost(combined: CombinedAdapter) -> str:
    lost = []
    if "use_rslora" in combined.kinds and not math.isclose(combined.scaling, 1.0):
        lost.append(f"use_rslora scales it by {combined.scaling:g} once more")
    if "use_dora" in combined.kinds:
        lost.append("the magnitudes of DoRA (use_dora) are those of the base, not of its sources")
    if "lora_bias" in combined.kinds:
        lost.append("the biases of its sources (lora_bias) are not in it")
    if "kasa_config" in combined.kinds:
        lost.append("the diagonals of KaSA of its sources (kasa_config) are not in it")
    return "; ".join(lost)
