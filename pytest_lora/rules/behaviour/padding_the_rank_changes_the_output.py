from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import LawFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA933", severity="error", needs=LawFacts)
def padding_the_rank_changes_the_output(facts: LawFacts, expect: Expect) -> Iterator[Violation]:
    """Zeros that are added to the factors change the output.

    ## What it does
    Pads `lora_A` with rows of zeros and `lora_B` with columns of zeros, and compares the output of each
    layer.

    ## Why is this bad?
    A forward that uses the shape of the factors in place of the scaling breaks with `rank_pattern`, with
    adapters padded to one rank by a server, and with resized ranks.

    ## Example
    ```python
    from unittest.mock import patch

    from peft.tuners.lora import Linear

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    forward = Linear.forward


    def changed(layer, x, *args, **kwargs):
        plain, out = layer.base_layer(x), forward(layer, x, *args, **kwargs)
        return out if layer.merged else plain + (out - plain) * len(layer.lora_A["default"].weight) / 8


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
    if facts.padded:
        off = max(off for _, off in facts.padded)
        yield Violation(
            where=grouped(name for name, _ in facts.padded),
            observed=f"rows of zeros in lora_A and columns of zeros in lora_B move the output by {off:.3g}",
            expected="the same output: they add nothing",
            fix="look for a forward that uses the shape of the factors, where the scaling belongs",
        )
