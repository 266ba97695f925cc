from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA429", severity="error", needs=CheckpointFacts)
def key_is_there_twice(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """Two keys of the file mean the same tensor.

    ## What it does
    Takes names of wrappers and of the adapter out of the keys and looks for keys that are then the same.

    ## Why is this bad?
    Which of the two is loaded is chance. State dicts of several saves were put together, or of the wrapped and
    the unwrapped model.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: tensors | {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if not facts.is_judged or facts.misnamed:
        return
    seen: dict[str, str] = {}
    doubled: dict[str, tuple[str, str]] = {}
    for tensor in facts.tensors:
        key = facts.key(tensor)
        first = seen.setdefault(key.peft_name, tensor.name)
        if first != tensor.name:
            doubled[key.module] = first, tensor.name
    if doubled:
        first, second = next(iter(doubled.values()))
        yield Violation(
            where=grouped(doubled),
            observed=f"{first[:150]} and {second[:150]} are keys of the same tensor",
            expected="one key for each tensor",
            fix="save the adapter again with save_pretrained of the PeftModel",
        )
