from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import ranked


@rule("LORA131", severity="error", needs=ConfigFacts)
def rank_is_odd_for_orthogonal_init(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The orthogonal initialisation splits the rank in two halves, and the rank is odd.

    ## What it does
    Looks for `init_lora_weights="orthogonal"` on modules whose rank, patterns applied, is odd; on embeddings PEFT
    does without it.

    ## Why is this bad?
    PEFT raises: one half of an orthogonal matrix goes to `lora_A`, the other to `lora_B`.

    ## Example
    ```python
    config = LoraConfig(r=7, lora_alpha=7, target_modules=["q_proj"], init_lora_weights="orthogonal")
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="orthogonal")
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.init_lora_weights
    """
    if str(facts.settings.init_lora_weights).lower() != "orthogonal" or facts.live:
        return
    odd = [layer for layer in facts.layers if layer.rank % 2 and layer.kind != "Embedding"]
    if odd:
        yield Violation(
            where=grouped(layer.module for layer in odd),
            observed=f"init_lora_weights='orthogonal' with r={odd[0].rank}",
            expected="an even rank",
            fix=change("set", **ranked(facts.settings, odd[0].module, odd[0].rank + 1)),
        )
