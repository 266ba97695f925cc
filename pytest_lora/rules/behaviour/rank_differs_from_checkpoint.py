from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.saved_config import ResumptionFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import as_in_checkpoint


@rule("LORA920", severity="error", needs=ResumptionFacts)
def rank_differs_from_checkpoint(facts: ResumptionFacts, expect: Expect) -> Iterator[Violation]:
    """The rank of the run that is to go on is not that of the checkpoint.

    ## What it does
    Compares the rank that the configuration gives each module with that of its factors in the checkpoint.

    ## Why is this bad?
    The shapes of the factors are fixed when the adapter is made. Weights of another rank do not load, or load
    in part.

    ## Example
    ```python
    path = adapter()
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_resume(path, config)
    ```

    ## Use instead
    ```python
    path = adapter()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_resume(path, config)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.ranks:
        first = facts.ranks[0]
        yield Violation(
            where=facts.where,
            observed=f"the configuration has r={first.now}, the checkpoint rank {first.before} in "
            f"{grouped(first.modules)}; LoRA shapes are fixed at initialisation",
            expected="the rank of the checkpoint",
            fix=as_in_checkpoint(facts, "r", "rank_pattern"),
        )
