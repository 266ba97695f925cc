from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA435", severity="error", needs=CheckpointFacts)
def dtype_is_not_floating(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """LoRA tensors are stored as whole numbers.

    ## What it does
    Looks at the dtype of every LoRA tensor.

    ## Why is this bad?
    The factors are floating-point numbers. Whole numbers come from quantizing the adapter together with the
    model, or from a conversion that cut off the fractions.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: v.to(torch.int8) for k, v in tensors.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/safetensors#format
    """
    if not facts.is_judged:
        return
    whole = [t for t in facts.lora if not t.dtype.startswith(("F", "BF")) and 0 not in t.shape]
    if whole:
        kinds = ", ".join(sorted({t.dtype for t in whole}))
        yield Violation(
            where=grouped(facts.key(t).module for t in whole),
            observed=f"{len(whole)} of {len(facts.lora)} adapter tensors have the dtype {kinds}",
            expected="float32, bfloat16 or float16",
            fix="save the adapter in the dtype that it was trained in",
        )
