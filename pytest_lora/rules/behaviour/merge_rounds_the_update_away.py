from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import MergeFacts
from pytest_lora.rules import Violation, rule

MOST = 0.5
"""Of the numbers that should change, so many that do not."""

LOST = 0.5
"""Of the adapter's effect on the output, so much that the merge takes."""


@rule("LORA926", severity="warning", needs=MergeFacts)
def merge_rounds_the_update_away(facts: MergeFacts, expect: Expect) -> Iterator[Violation]:
    """Merging rounds most of the update away, as the weights are too coarse for it.

    ## What it does
    Counts the numbers of plain adapted matrices at which `W + BA` is `W` again, though `BA` is not zero. Where that is
    more than half of them, and the output of the merged model lies half of the adapter's whole effect or more off, it
    is a warning; where the output holds all the same, an info.

    ## Why is this bad?
    bfloat16 keeps eight bits of a number: an update below a 512th of a weight is gone. The merged model
    is nearer to its base than to what was trained, and no tolerance of a comparison shows it, as the
    whole effect is within rounding.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base.bfloat16(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-4)
    report = check_merge(model, batch)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base.bfloat16(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-4)
    model = model.float()
    report = check_merge(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/model_merging
    """
    _, allowed = facts.tolerance
    if facts.unchanged is None or facts.unchanged <= MOST or not facts.apart <= allowed:
        return
    lost = facts.apart / facts.effect if facts.effect else 0.0
    yield Violation(
        where=f"adapted weights in {' and '.join(facts.dtypes)}",
        observed=f"{facts.unchanged:.0%} of their numbers are the same after the merge, though the update there is not "
        f"zero; the merged output lies {lost:.0%} of the adapter's effect off",
        expected="weights that are fine enough for the update",
        fix="merge in float32 and save so: model = model.float(); or serve the adapter beside its base, unmerged",
        severity=None if lost >= LOST else "info",
    )
