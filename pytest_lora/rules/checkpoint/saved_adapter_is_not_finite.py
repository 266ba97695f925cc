from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA441", severity="error", needs=CheckpointFacts)
def saved_adapter_is_not_finite(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The file holds NaN or infinity.

    ## What it does
    Counts NaN and infinite values in every floating-point tensor of the file.

    ## Why is this bad?
    One such value spreads through every layer after it: the model prints nonsense, while the job that saved
    the file may have reported success.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: v * float("nan") for k, v in tensors.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.isfinite.html
    """
    broken = [t for t in facts.tensors if t.values and t.values.nans + t.values.infinities]
    if not broken:
        return
    nans = sum(t.values.nans for t in broken if t.values)
    infinities = sum(t.values.infinities for t in broken if t.values)
    kinds = [f"{nans:,} NaN"] * bool(nans) + [f"{infinities:,} infinite"] * bool(infinities)
    yield Violation(
        where=grouped(dict.fromkeys(facts.key(t).module for t in broken)),
        observed=f"{' and '.join(kinds)} values in {len(broken)} of {len(facts.tensors)} tensors",
        expected="finite numbers",
        fix="do not use this checkpoint: go back to the last one that is finite, and lower the learning rate",
    )
