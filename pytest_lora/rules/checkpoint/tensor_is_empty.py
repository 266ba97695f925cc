from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import Key
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA432", severity="error", needs=CheckpointFacts)
def tensor_is_empty(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """A tensor has no numbers, or a LoRA factor has lost a dimension.

    ## What it does
    Looks for tensors with a size of zero, and for lora_A and lora_B with fewer than two dimensions.

    ## Why is this bad?
    DeepSpeed ZeRO-3 and FSDP keep each parameter in parts, and what is left in its place is an empty or
    flat tensor. It was saved without being gathered.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: torch.empty(0) for k in tensors})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/trl/issues/4416
    - https://huggingface.co/docs/peft/accelerate/deepspeed
    """
    if not facts.is_judged:
        return
    empty = [t for t in facts.tensors if 0 in t.shape]
    flat = [t for t in facts.lora if len(t.shape) < 2 and 0 not in t.shape and _is_factor(facts.key(t))]
    for found, all_of_them, words in (
        (empty, f"{len(facts.tensors)} tensors", "empty"),
        (flat, f"{len(facts.lora)} adapter tensors", "flat"),
    ):
        if found:
            shape = "x".join(map(str, found[0].shape)) or "a single number"
            yield Violation(
                where=grouped(facts.key(t).module for t in found),
                observed=f"{len(found)} of {all_of_them} are {words} (shape {shape}): "
                "they were saved before the shards of ZeRO-3 or FSDP were gathered",
                expected="lora_A of rank x in_features, lora_B of out_features x rank",
                fix="gather before saving: deepspeed.zero.GatheredParameters, or FSDP with a full state dict",
            )


def _is_factor(key: Key) -> bool:
    return key.part not in ("", "lora_magnitude_vector") and not key.peft_name.endswith(".bias")
