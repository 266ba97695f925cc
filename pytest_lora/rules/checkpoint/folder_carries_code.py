from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA406", severity="info", needs=CheckpointFacts)
def folder_carries_code(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The folder carries code, which is not run here but may be elsewhere.

    ## What it does
    Names Python files in the folder and fields of the configuration that name code to import.

    ## Why is this bad?
    An adapter needs no code. With `trust_remote_code=True`, or as an import on the path, it would run.

    ## Example
    ```python
    path = adapter()
    write(path, "modeling.py", "print('hello')")
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/transformers/custom_models
    """
    files = [e.name for e in facts.files if e.name.endswith((".py", ".pyc", ".so", ".pyd"))]
    fields = facts.config.code if facts.config else ()
    carried = [*files[:5], *(f"{field} in {CONFIG}" for field in fields)]
    if carried:
        yield Violation(
            where=facts.name,
            observed=f"code comes with the adapter: {', '.join(carried)}; none of it was run",
            expected="configuration and weights alone",
            fix="read the code before anything loads this folder with trust_remote_code=True",
        )
