from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA401", severity="error", needs=CheckpointFacts)
def file_is_not_readable(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """A file of the adapter cannot be read, or is not what its name says.

    ## What it does
    Reads the header of the safetensors file and holds it against the file: its length, names, dtypes,
    shapes, and that the tensors follow each other without gap or overlap up to the end. Links out of the
    folder are not followed.

    ## Why is this bad?
    A damaged, cut off or swapped file raises when the adapter is loaded, or loads as something else.
    Uploads and copies that broke off are the usual cause, pointers of Git LFS and pickles that were only
    renamed are others.

    ## Example
    ```python
    path = adapter()
    cut(path, "adapter_model.safetensors", by=100)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/safetensors#format
    - https://github.com/huggingface/transformers/issues/27397
    """
    for fault in facts.faults:
        if fault.file == CONFIG:
            continue
        yield Violation(
            where=f"{fault.file} in {facts.name}",
            observed=fault.observed,
            expected=_EXPECTED.get(fault.kind, "a whole safetensors file"),
            fix=_FIXES[fault.kind],
            severity="info" if fault.file in TOKENIZER else None,
        )


TOKENIZER = ("added_tokens.json", "tokenizer_config.json")

_EXPECTED = {
    "link": "files that lie in the folder itself",
    "kind": "a regular file",
    "denied": "a file that may be read",
    "changed": "a file that stays as it is",
    "size": "a file of the usual size",
}

_FIXES = {
    "link": "put a copy of the file in the place of the link",
    "kind": "remove what is there, and save the adapter again",
    "denied": "give this user the right to read it",
    "changed": "check the adapter once nothing writes to the folder any more",
    "size": "save the adapter again; if the file is meant, nobody should load it without a look at what it is",
    "format": "copy or download the file again, or save the adapter again",
    "pointer": "run `git lfs pull`, or download the file itself",
    "pickle": "if you trust it, read it with torch.load(weights_only=True) and write it with "
    "safetensors.torch.save_file; else save the adapter again",
}
