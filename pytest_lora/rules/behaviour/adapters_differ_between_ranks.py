from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import SyncFacts, WeightDifference
from pytest_lora.rules import Violation, rule

SHOWN = 10
"""Weights that a finding names."""


@rule("LORA950", severity="error", needs=SyncFacts)
def adapters_differ_between_ranks(facts: SyncFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is not the same on all ranks.

    ## What it does
    Compares the weights of the adapter, and all that is trained, between the ranks of the process group, bit
    for bit.

    ## Why is this bad?
    Each rank trains an adapter of its own, and only that of rank 0 is saved.

    ## Example
    ```python
    report = run_distributed(step_without_synchronisation, args=[check_adapters_in_sync])[0]
    ```

    ## Use instead
    ```python
    report = run_distributed(step_in_ddp, args=[check_adapters_in_sync])[0]
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """
    if facts.differences:
        shown = "; ".join(_in_words(one) for one in facts.differences[:SHOWN])
        more = len(facts.differences) - SHOWN
        yield Violation(
            where=f"{len(facts.differences)} of {facts.weights} weights on {facts.ranks} ranks",
            observed=_cause(facts) + (f"{shown}; and {more} more" if more > 0 else shown),
            expected="the same adapter on every rank, bit for bit",
            fix="wrap the model in DDP or FSDP after the adapter was made, and take every optimizer step outside "
            "no_sync()",
        )


def _cause(facts: SyncFacts) -> str:
    return "".join(
        f"{late.wrapper} wrapped the model before the adapter was put in, and does not reduce the gradients of "
        f"{len(late.parameters)} of its parameters: "
        for late in facts.late
    )


def _in_words(one: WeightDifference) -> str:
    ranks = f"{'rank' if len(one.ranks) == 1 else 'ranks'} {', '.join(map(str, one.ranks))} unlike rank 0"
    if one.kind == "missing":
        return f"{one.name}: {ranks}, where only some have it"
    if one.kind == "form":
        return f"{one.name}: {ranks}, in shape or dtype"
    return f"{one.name}: {ranks}, by up to {one.largest:.3g}"
