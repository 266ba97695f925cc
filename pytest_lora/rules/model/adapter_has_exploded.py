from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

LARGEST = 1000.0
"""Absolute value above which a factor has left every range that training gives: kaiming draws of ``lora_A`` stay
below 1, a trained ``lora_B`` below 10, and what PiSSA puts into both in the tens."""


@rule("LORA237", severity="warning", needs=ModelFacts)
def adapter_has_exploded(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The values of an adapter are finite, but larger than any training makes them.

    ## What it does
    Looks for absolute values above 1000 in the two factors.

    ## Why is this bad?
    The adapter drowns the base: training diverged, or a file was read in the wrong form. In 16 bits the next product is
    infinite.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1e6)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://github.com/pytorch/torchtitan/issues/421
    """
    factors = [(layer, factor) for layer in facts.layers for factor in (layer.a, layer.b)]
    large = [(layer, f, f.largest) for layer, f in factors if f.largest is not None and f.largest > LARGEST]
    if large:
        layer, factor, largest = max(large, key=lambda found: found[2])
        yield Violation(
            where=grouped(dict.fromkeys(layer.module for layer, _, _ in large)),
            observed=f"{factor.name} of adapter {layer.adapter!r} holds values up to {largest:.3g}: it has exploded",
            expected=f"absolute values far below {LARGEST:g}",
            fix="go back to a checkpoint from before the loss diverged; lower the learning rate, clip gradients",
        )
