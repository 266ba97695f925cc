from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, PICKLED, WEIGHTS, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA402", severity="error", needs=CheckpointFacts)
def weights_are_missing(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The folder has a configuration, but no weights that PEFT would load.

    ## What it does
    Looks for adapter_model.safetensors beside adapter_config.json, and names what there is instead.

    ## Why is this bad?
    PEFT raises, or looks for the file on the hub. Checkpoints of DeepSpeed and FSDP hold the adapter in
    files of their own until they are gathered.

    ## Example
    ```python
    path = adapter()
    remove(path, "adapter_model.safetensors")
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    - https://huggingface.co/docs/peft/accelerate/fsdp
    """
    if (
        facts.weights is not None
        or facts.config is None
        or facts.config.tool
        or facts.has(PICKLED)
        or facts.shards
        or facts.merged
    ):
        return
    parts = [e.name for e in facts.entries if e.name.endswith(".distcp") or e.name.startswith("global_step")]
    parts += [e.name for e in facts.entries if "fsdp" in e.name]
    others = [e.name for e in facts.files if e.name.endswith(".safetensors")]
    if parts:
        seen = f"; {parts[0]} is of a distributed checkpoint"
        fix = "gather the weights while saving: trainer.save_model() with a full state dict, or merge the parts first"
    elif others:
        seen = f"; there is {others[0]}"
        fix = f"if {others[0]} is the adapter, rename it to {WEIGHTS}"
    else:
        seen = ""
        fix = "save the adapter again with save_pretrained of the PeftModel, or copy the missing file"
    yield Violation(
        where=f"{facts.name}",
        observed=f"there is no {WEIGHTS} beside {CONFIG}{seen}",
        expected=f"{WEIGHTS} with the weights of the adapter",
        fix=fix,
    )
