from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

MOST = 30.0
"""Root mean square of lora_B times the scaling. Under the default initialisation of lora_A, inputs of size 1 and
rank 8, an update of this size is some fifty times as large as they are; trained adapters are below 1."""


@rule("LORA444", severity="warning", needs=CheckpointFacts)
def saved_adapter_is_huge(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The values of lora_B are finite, but so large that the adapter drowns the base.

    ## What it does
    Compares the size of lora_B, its root mean square times the scaling of the configuration, with 30. That of
    trained adapters is far below 1. Where r and lora_alpha were left out of the configuration, other rules speak.

    ## Why is this bad?
    The training diverged before it was saved, or the scaling was multiplied into the file more than once. The model
    prints nonsense, and in float16 the values overflow.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: v * 1e4 if "lora_B" in k else v for k, v in tensors.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - The initialisation: https://arxiv.org/abs/2106.09685, section 4.1
    """
    settings = facts.settings
    if not facts.is_judged or settings is None:
        return
    sizes: dict[str, float] = {}
    for module in facts.adapted:
        factor, scaling = module.b, settings.scaling_of(module.name)
        if factor is None or factor.values is None or scaling is None or ".lora_B" not in factor.name:
            continue
        values = factor.values
        if values.rms is not None and not values.nans and not values.infinities:
            sizes[module.name] = values.rms * abs(scaling)
    huge = {name: size for name, size in sizes.items() if size > MOST}
    if huge:
        yield Violation(
            where=grouped(huge),
            observed=f"lora_B is too large in {len(huge)} of {len(sizes)} modules: its values, scaling applied, are "
            f"about {max(huge.values()):.2g} in size, as after a training that diverged (exploding weights)",
            expected=f"values of at most {MOST:g}; those of trained adapters are far below 1",
            fix="go back to a checkpoint from before the loss rose and lower the learning rate, or lora_alpha if that "
            "is not the one of the training",
        )
