from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import PICKLED, WEIGHTS, CheckpointFacts
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.rules import Violation, rule


@rule("LORA403", severity="warning", needs=CheckpointFacts)
def weights_are_pickled(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is a pickle, which is not opened, so that nothing in it was judged.

    ## What it does
    Names adapter_model.bin where it is the only file with weights. Under `Expect(read_pickle=True)` it is
    read: nothing is built of it but names and shapes, in a process with limits. Where it lies beside
    adapter_model.safetensors, their sizes and bytes say whether it holds the same numbers; it is not opened for that.
    Other pickles in the folder are mentioned.

    ## Why is this bad?
    Loading a pickle can run any code. PEFT has written safetensors by default since 0.6. Of two files with
    different tensors one is stale: PEFT takes the safetensors, other tools may take the pickle.

    ## Example
    ```python
    path = adapter()
    pickle_weights(path)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/safetensors/index
    - https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only-security
    """
    names = facts.pickles
    if PICKLED in names and facts.weights is None:
        yield Violation(
            where=f"{PICKLED} in {facts.name}",
            observed="the adapter is a pickle; it was not opened, so nothing in it was judged",
            expected=WEIGHTS,
            fix="save it again with safe_serialization=True, or, if you trust it, give Expect(read_pickle=True), which "
            "reads its tensors and nothing else",
        )
        names = tuple(name for name in names if name != PICKLED)
    elif stale := _stale(facts):
        yield Violation(
            where=f"{PICKLED} in {facts.name}",
            observed=f"{stale}, so one of the two is stale",
            expected="the weights once",
            fix=f"delete the older one; PEFT loads {WEIGHTS}, and never looks at {PICKLED} beside it",
        )
        names = tuple(name for name in names if name != PICKLED)
    if names:
        yield Violation(
            where=f"{', '.join(names[:5])} in {facts.name}",
            observed=f"{len(names)} pickle{'s lie' if len(names) > 1 else ' lies'} beside the adapter, not opened",
            expected="no pickles in a folder that is passed on",
            fix="leave them out where the adapter is published; PEFT does not load them",
            severity="info",
        )


def _stale(facts: CheckpointFacts) -> str | None:
    """What tells that two files of weights are not the same adapter."""
    other = facts.other_pickle
    if other is not None:
        size = next(entry.bytes for entry in facts.files if entry.name == facts.weights)
        return (
            f"{PICKLED} of {format_bytes(other.bytes)} lies beside {WEIGHTS} of {format_bytes(size)}: by their sizes "
            "they hold different tensors"
        )
    if facts.pickle_differs:
        return f"{PICKLED} lies beside {WEIGHTS} and holds tensors of the same sizes with other numbers"
    return None
