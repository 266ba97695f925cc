from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA411", severity="error", needs=CheckpointFacts)
def config_is_missing(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """There are adapter weights, but no adapter_config.json.

    ## What it does
    Looks for adapter_config.json. Files of diffusers and kohya-ss have none, and are named by another rule.

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
    yield Violation(
        where=facts.name,
        observed=f"there is no {CONFIG}; the folder holds {files}",
        expected=f"{CONFIG} with the rank, alpha and targets that the adapter was trained with",
        fix=f"adapters with names of their own lie in folders of their own: point to {' or '.join(facts.within)}"
        if facts.within
        else "copy the file from where the adapter was saved, or point to the folder that has it",
    )
