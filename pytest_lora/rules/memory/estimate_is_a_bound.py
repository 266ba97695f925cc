from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.memory import MemoryFacts
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.memory import may_need_less, may_need_more, step_in_words, surely_fits


@rule("LORA506", severity="warning", needs=MemoryFacts)
def estimate_is_a_bound(facts: MemoryFacts, expect: Expect) -> Iterator[Violation]:
    """Whether the step fits is open, because part of it is not modelled.

    ## What it does
    Some parts of a step are not predicted: kernels of a package that packed the base, what `torch.compile`
    fuses, what DDP adds. The peak is then "at least" or "at most" what is said. It fires where that leaves
    open whether the step fits the budget.

    ## Why is this bad?
    A lower bound below the budget does not show that the step fits, and an upper bound above the budget does
    not show that it does not. The test proves less than it seems to.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(gptq_7b, config, batch_size=1, seq_len=512, budget="7GiB")
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(gptq_7b, config, batch_size=1, seq_len=512, budget="16GiB")
    ```

    ## References
    - GPTQ in transformers: https://huggingface.co/docs/transformers/quantization/gptq
    - torch.compile: https://docs.pytorch.org/docs/stable/torch.compiler.html
    """
    estimate = facts.estimate
    fits = estimate.peak_allocated <= facts.budget
    if surely_fits(estimate, facts.budget) or not (
        may_need_more(estimate) if fits else may_need_less(estimate)
    ):
        return
    parts = "; ".join(f"{part.what} not modelled" for part in estimate.unmodelled)
    yield Violation(
        where=step_in_words(estimate),
        observed=f"the peak is {estimate.bound} {format_bytes(estimate.peak_allocated)}, on a budget of "
        f"{format_bytes(facts.budget)}: {parts}",
        expected="a figure that settles whether the step fits",
        fix="measure the step on the GPU itself (the marker lora_vram_limit), or choose a budget further away",
    )
