from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA203", severity="error", needs=ModelFacts, passing=True)
def adapter_left_merged(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter is merged into the base weights while it should train, or in part.

    ## What it does
    Looks for layers whose adapter is merged into the base weight. In a model for evaluation or inference, one that is
    merged in some of its modules and not in the others is a warning.

    ## Why is this bad?
    A merged layer runs the base weight alone: its adapter is outside the forward pass, gets no gradient,
    and does not learn. Saved as it stands, the base weights hold the update twice. Merged in part, it works as before,
    but what takes the adapter away (`unload`, `delete_adapter`) or saves the base leaves that part of it behind.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.merge_adapter()
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.merge_adapter()
    model.unmerge_adapter()
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraModel.merge_adapter
    """
    merged = [layer for layer in facts.layers if layer.merged]
    if expect.purpose != "train":
        yield from _merged_in_part(facts)
    elif merged:
        yield Violation(
            where=grouped(layer.module for layer in merged),
            observed=f"adapter {merged[0].adapter!r} is merged into the base weights",
            expected="adapters apart from the base weights while they train",
            fix="call model.unmerge_adapter() before training",
        )


def _merged_in_part(facts: ModelFacts) -> Iterator[Violation]:
    for adapter in facts.adapters:
        layers = facts.of(adapter)
        merged = [layer.module for layer in layers if layer.merged]
        if 0 < len(merged) < len(layers):
            yield Violation(
                where=grouped(merged),
                observed=f"adapter {adapter!r} is merged into the base weights of {len(merged)} of its {len(layers)} "
                "modules, and not in the others: unloading it, or saving the base, leaves that part of it behind",
                expected="an adapter that is merged everywhere or nowhere",
                fix="call model.unmerge_adapter(), or model.merge_adapter() to merge the rest too",
                severity="warning",
            )
