from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA421", severity="error", needs=CheckpointFacts)
def file_holds_no_adapter(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The file is sound, but there is no LoRA tensor in it.

    ## What it does
    Counts the LoRA tensors of the file.

    ## Why is this bad?
    Loading it gives the base model back. The state dict was empty at the time of saving (DeepSpeed ZeRO-3,
    torch.compile), or the adapter had been merged and unloaded before.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/trl/issues/4416
    - https://github.com/huggingface/peft/issues/2764
    """
    if not facts.is_judged or facts.lora or _saves_only_modules(facts):
        return
    others = (
        f"{len(facts.tensors)} tensors, none of them of LoRA" if facts.tensors else "no tensors: it is empty"
    )
    below = sum(".base_layer." in tensor.name for tensor in facts.tensors)
    yield Violation(
        where=f"{facts.weights} in {facts.name}",
        observed=f"the file contains {others}"
        + (
            f", but {below} base weights (base_layer) from under an adapter: the other half was kept"
            * bool(below)
        ),
        expected="lora_A and lora_B of every adapted module",
        fix="save with save_pretrained of the PEFT model, or take the keys that contain 'lora_' out of its state dict "
        "instead of all others"
        if below
        else "save the adapter before merge_and_unload, and under ZeRO-3 or FSDP gather the weights first",
    )


def _saves_only_modules(facts: CheckpointFacts) -> bool:
    """Whether the configuration asks for no LoRA at all, but for token rows or modules of the base."""
    settings = facts.settings
    if settings is None or not facts.tensors or settings.target_modules not in ((), ""):
        return False
    return not settings.target_parameters
