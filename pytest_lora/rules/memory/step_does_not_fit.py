from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.memory import MemoryFacts
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.memory import advice, in_float32, largest_parts, may_need_less, step_in_words


@rule("LORA502", severity="error", needs=MemoryFacts)
def step_does_not_fit(facts: MemoryFacts, expect: Expect) -> Iterator[Violation]:
    """A training step needs more memory than the GPU has.

    ## What it does
    Compares the predicted peak of allocated memory with the budget, where the weights alone fit.

    ## Why is this bad?
    The first batch, or the first of full length, runs out of memory, after the model was loaded and the data
    prepared. What fills the memory is named, and each change that could help is estimated: nearly always it
    is tokens, checkpointing or the base's storage, hardly ever the rank.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(llama_7b, config, batch_size=4, seq_len=2048, budget="24GiB", quantization="nf4")
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(
        llama_7b,
        config,
        batch_size=4,
        seq_len=2048,
        budget="24GiB",
        quantization="nf4",
        gradient_checkpointing=True,
    )
    ```

    ## References
    - QLoRA, section 3: https://arxiv.org/abs/2305.14314
    - Anatomy of a model's memory: https://huggingface.co/docs/transformers/model_memory_anatomy
    """
    estimate = facts.estimate
    if (
        estimate.peak_allocated <= facts.budget
        or estimate.peak_loading > facts.budget
        or may_need_less(estimate)
    ):
        return
    yield Violation(
        where=step_in_words(estimate),
        observed=f"the peak needs {format_bytes(estimate.peak_allocated)}, "
        f"{format_bytes(estimate.peak_allocated - facts.budget)} more than the budget, in the "
        f"{estimate.peak_in_words}; {largest_parts(estimate)}{in_float32(estimate)}",
        expected=f"a peak of at most {format_bytes(facts.budget)}",
        fix=advice(facts),
    )
