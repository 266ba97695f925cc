from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import scaled


@rule("LORA102", severity="warning", needs=ConfigFacts, on_saved="alone")
def alpha_damps_the_adapter(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The scaling is so small that the adapter hardly acts.

    ## What it does
    Computes the effective scaling of every adapted module (`alpha / r`, or `alpha / sqrt(r)` under
    rsLoRA, patterns applied) and looks for values below `Expect.min_scaling`. Below
    `Expect.low_scaling` it is only mentioned, unless alpha is the 8 that PEFT takes where none is given and the
    scaling is 1/16 or less.

    ## Why is this bad?
    The update and its gradients are both multiplied by the scaling. An alpha that was left from a
    smaller rank makes a large rank learn less than the small one did, at any usual learning rate.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=0.25, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/kohya-ss/sd-scripts/issues/98
    - rsLoRA: https://arxiv.org/abs/2312.03732
    """
    damped = [layer for layer in facts.layers if 0 < layer.scaling < expect.low_scaling]
    for scaling in sorted({layer.scaling for layer in damped}):
        layers = [layer for layer in damped if layer.scaling == scaling]
        rank, alpha = layers[0].rank, layers[0].alpha
        left = alpha == DEFAULT and scaling <= FAR_BELOW
        grave = scaling < expect.min_scaling
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"r={rank} with alpha={alpha:g}: the scaling is {scaling:.2g}"
            + (", and 8 is PEFT's default for lora_alpha" if left else ""),
            expected=f"a scaling of at least {expect.min_scaling if grave else expect.low_scaling:g}, or a choice",
            fix=advise(
                f"scale alpha with {'the root of r under rsLoRA' if layers[0].use_rslora else 'r'}: ",
                change(**scaled(facts.settings, layers[0].module, 2.0)),
                " gives a scaling of 2",
            ),
            severity="warning" if grave or left else "info",
        )


DEFAULT, FAR_BELOW = 8, 1 / 16
"""PEFT's ``lora_alpha`` where none is given, and half of ``Expect.low_scaling``: r=128, as reported to
huggingface/lerobot (issue 3551)."""
