from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    for bit. Which of them differ tells why: gradients that are not averaged move `lora_B` first, other random
    numbers at the start leave it alone, and a rank that loaded nothing still has it at zero.

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
        cause, fix = _cause(facts)
        yield Violation(
            where=f"{len(facts.differences)} of {facts.weights} weights on {facts.ranks} ranks",
            observed=cause + (f"{shown}; and {more} more" if more > 0 else shown),
            expected="the same adapter on every rank, bit for bit",
            fix=fix,
        )


WRAP = (
    "wrap the whole model in DDP or FSDP after the adapter was made, call what wraps it and not the module inside, "
    "and take every optimizer step outside no_sync()"
)
SEED = (
    "call torch.manual_seed with one number on every rank before the head and the adapter are made, or broadcast "
    "them from rank 0, as DDP does with all that it wraps; reduce the gradients of every trained weight"
)
LOAD = "load the adapter on every rank, or broadcast it from rank 0 once it is loaded"


def _cause(facts: SyncFacts) -> tuple[str, str]:
    """Why the ranks differ, as far as it shows in which weights do, and what to change."""
    if facts.late:
        return "".join(
            f"{late.wrapper} wrapped the model before the adapter was put in, and does not reduce the gradients of "
            f"{len(late.parameters)} of its parameters: "
            for late in facts.late
        ), WRAP
    if any(one.kind != "values" for one in facts.differences):
        return "", WRAP
    moved = [one for one in facts.differences if one.starts_at_zero]
    if not moved:
        return (
            "what starts at zero is the same everywhere, so the ranks began with other random numbers: ",
            SEED,
        )
    still = sorted({rank for one in moved for rank in one.zero})
    if still:
        return (
            f"lora_B is zero on {_ranks(still)} and not on the others, so it was loaded or trained there alone: ",
            LOAD,
        )
    return "the gradients are not averaged over the ranks: ", WRAP


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(map(str, numbers))}"


def _in_words(one: WeightDifference) -> str:
    ranks = f"{_ranks(one.ranks)} unlike rank 0"
    if one.kind == "missing":
        return f"{one.name}: {ranks}, where only some have it"
    if one.kind == "form":
        return f"{one.name}: {ranks}, in shape or dtype"
    return f"{one.name}: {ranks}, by up to {one.largest:.3g}"
