from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA445", severity="warning", needs=CheckpointFacts)
def saved_factors_are_filled_in_part(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The same part of every saved factor still is as it was initialised.

    ## What it does
    Looks for files that hold trained values, but in which the same ranks of lora_B are zero in every module while
    lora_A is not, or the same half, quarter or eighth of its rows.

    ## Why is this bad?
    A step of training moves every number of lora_B. What is zero in all modules alike was never gathered: the
    shard of one GPU was written as if it were the whole, or an adapter of a smaller rank was copied into a larger
    one. The file loads without a word and works in part.

    ## Example
    ```python
    path = adapter()
    second_half = torch.arange(4, 8)
    edit(path, lambda t: {k: v.index_fill(1, second_half, 0) if "lora_B" in k else v for k, v in t.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/accelerate/fsdp
    """
    if not facts.is_judged or expect.fresh is True:
        return
    held = list(_held(facts))
    idle = {module.idle for module in held}
    if len(held) > 1 and len(idle) == 1 and any(next(iter(idle))):
        count = sum(next(iter(idle)))
        yield _violation(facts, held, f"{count} of {len(next(iter(idle)))} ranks (columns)")
        return
    kinds: dict[str, set[float]] = defaultdict(set)
    for module in held:
        kinds[module.kind].add(module.share)
    for share in _SHARES:
        # One kind alone may be a fused projection of which a part is adapted on purpose.
        alike = {kind for kind, shares in kinds.items() if shares == {share}}
        if len(alike) > 1:
            where = [module for module in held if module.kind in alike]
            yield _violation(facts, where, f"{100 * share:g} % of the rows, in one block,")
            return


_SHARES = (1 / 2, 3 / 4, 7 / 8)
"""What is missing where one of 2, 4 or 8 equal shards is there."""


def _violation(facts: CheckpointFacts, modules: list[_Held], part: str) -> Violation:
    return Violation(
        where=f"{facts.weights} in {facts.name}: {grouped(module.name for module in modules)}",
        observed=f"{part} of lora_B are zero in each of {len(modules)} modules, as they were initialised, and the rest "
        "is not: a part was saved, such as one rank's slice or shard",
        expected="factors that are saved as a whole",
        fix="gather the shards of all ranks before saving, and save again",
    )


class _Held(NamedTuple):
    """A module with trained values.

    Attributes:
        name: Its name.
        idle: Whether each rank has a row of lora_A and no column of lora_B; empty where that is not known.
        share: Of the rows of lora_B, those that are zero in one block.
    """

    name: str
    idle: tuple[bool, ...]
    share: float

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


def _held(facts: CheckpointFacts) -> Iterator[_Held]:
    for module in facts.adapted:
        a, b = (t.values.marks if t and t.values else None for t in (module.a, module.b))
        if a and b and module.b and not module.holds_nothing:
            ranks = zip(a.rows, b.columns, strict=True) if len(a.rows) == len(b.columns) else ()
            idle = tuple(mine and not other for mine, other in ranks)
            yield _Held(module.name, idle, b.zero_rows / module.b.shape[0])
