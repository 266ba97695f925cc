from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA411", severity="error", needs=CheckpointFacts)
def config_is_missing(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """There are adapter weights, but no adapter_config.json.

    ## What it does
    Looks for adapter_config.json. Files of diffusers and kohya-ss have none, and are named by another rule. Of a
    whole model beside it the names of the tensors are read: it may hold the LoRA layers, as a state dict of the
    wrapped model does.

    ## Why is this bad?
    Without it neither rank, alpha nor targets are known, and PEFT does not load the weights.

    ## Example
    ```python
    path = adapter()
    remove(path, "adapter_config.json")
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.config is not None or any(f.file == CONFIG for f in facts.faults) or facts.other_method:
        return
    files = ", ".join(e.name for e in facts.entries[:5]) or "nothing at all"
    unlisted = any(f.kind == "denied" and f.file == facts.name for f in facts.faults)
    if unlisted:
        return
    if facts.unmerged:
        yield Violation(
            where=f"{facts.unmerged} in {facts.name}",
            observed=f"the file holds a whole model with its LoRA layers, not merged (base_layer, lora_A and lora_B), "
            f"and there is no {CONFIG}: from_pretrained finds no place for them, and makes the adapted weights anew",
            expected="an adapter, or a merged model",
            fix="save with save_pretrained of the PEFT model, or merge_and_unload() first and save what it returns; of "
            "this file keep the keys that contain 'lora_', and write the configuration that the training had",
        )
        return
    yield Violation(
        where=facts.name,
        observed=f"there is no {CONFIG}; the folder holds {files}",
        expected=f"{CONFIG} with the rank, alpha and targets that the adapter was trained with",
        fix=f"adapters with names of their own lie in folders of their own: point to {' or '.join(facts.within)}"
        if facts.within
        else "copy the file from where the adapter was saved, or point to the folder that has it",
    )
