"""Acme's servers compile kernels for ranks that are powers of two."""

from collections.abc import Iterator

from pytest_lora import Expect, Violation, rule
from pytest_lora.changes import change
from pytest_lora.facts.config import ConfigFacts


@rule("ACME001", severity="error", needs=ConfigFacts, on_saved="alone")
def rank_is_no_power_of_two(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The rank is no power of two.

    ## What it does
    Looks at `r`.

    ## Why is this bad?
    Acme's servers compile kernels for ranks that are powers of two, and refuse all others.

    ## Example
    ```python
    report = check_config(LoraConfig(r=12, lora_alpha=24, target_modules=["q_proj", "v_proj"]), base)
    ```

    ## Use instead
    ```python
    report = check_config(LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]), base)
    ```

    ## References
    - The handbook of Acme's servers.
    """
    rank = facts.settings.r
    if rank & (rank - 1):
        yield Violation(
            where="r",
            observed=f"r={rank} is no power of two",
            expected="4, 8, 16, 32 or 64",
            fix=change(r=1 << rank.bit_length()),
        )
