from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import PICKLED, WEIGHTS, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA404", severity="error", needs=CheckpointFacts)
def weights_are_sharded(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is split into shards, which PEFT does not load.

    ## What it does
    Looks for files such as adapter_model-00001-of-00002.safetensors without adapter_model.safetensors.

    ## Why is this bad?
    PEFT looks for one file only. Shards come from saving with the functions for whole models.

    ## Example
    ```python
    path = adapter()
    shard = "adapter_model-00001-of-00002.safetensors"
    rename(path, "adapter_model.safetensors", shard)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.shards and facts.weights is None and not facts.has(PICKLED):
        yield Violation(
            where=facts.name,
            observed=f"the adapter is split into shards: {', '.join(facts.shards[:3])}; PEFT loads none of them",
            expected=f"one {WEIGHTS}",
            fix="load the shards with safetensors and save them as one file, or use save_pretrained of the PeftModel",
        )
