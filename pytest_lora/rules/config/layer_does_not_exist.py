from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA105", severity="error", needs=ConfigFacts, on_saved="refused")
def layer_does_not_exist(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """layers_to_transform names blocks that the base does not have.

    ## What it does
    Compares `layers_to_transform` with the numbers of the base's blocks, or of those that `layer_replication` makes.

    ## Why is this bad?
    Numbers that do not exist are dropped without a word as long as one exists. Blocks count from 0, so
    that a list written from 1 misses the first and names one too many.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1])
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.layers_to_transform
    """
    known = facts.blocks
    lost = [i for i in facts.settings.layers_to_transform if i not in known]
    kept = tuple(i for i in facts.settings.layers_to_transform if i in known)
    owner = "layer_replication makes" if facts.settings.layer_replication else "the base has"
    if lost and known:
        yield Violation(
            where=f"layers_to_transform on {facts.base.architecture}",
            observed=f"{lost} of {list(facts.settings.layers_to_transform)} do not exist",
            expected=f"numbers from {known[0]} to {known[-1]}: {owner} {len(known)} blocks, counted from 0",
            fix=advise(f"drop {lost}: ", change(layers_to_transform=kept)),
        )
