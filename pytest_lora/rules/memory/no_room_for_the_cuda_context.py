from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise
from pytest_lora.expect import Expect
from pytest_lora.facts.memory import MemoryFacts
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.memory import beside_in_words, shorter, step_in_words


@rule("LORA503", severity="warning", needs=MemoryFacts)
def no_room_for_the_cuda_context(facts: MemoryFacts, expect: Expect) -> Iterator[Violation]:
    """A step fits the memory of the GPU only if CUDA itself needed none.

    ## What it does
    Adds to the predicted peak what the CUDA context takes on the device, roughly 0.5 GiB, and on several GPUs the
    buffers of NCCL, 0.5 to 1.4 GiB, and compares that with the budget.

    ## Why is this bad?
    The budget of a card is what is printed on it; CUDA's context and kernels take their share first, and
    the step runs out of memory by a few hundred MiB.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(llama_7b, config, batch_size=1, seq_len=512, budget="9.7GiB", quantization="nf4")
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(llama_7b, config, batch_size=1, seq_len=512, budget="16GiB", quantization="nf4")
    ```

    ## References
    - Memory use with CUDA: https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management
    """
    estimate = facts.estimate
    needed = estimate.most_allocated + estimate.beside_torch
    if not estimate.fits(facts.budget) or needed <= facts.budget:
        return
    yield Violation(
        where=step_in_words(estimate),
        observed=f"the peak of {format_bytes(estimate.most_allocated)} and {beside_in_words(estimate)} exceed the "
        f"budget of {format_bytes(facts.budget)}",
        expected=f"a peak of at most {format_bytes(facts.budget - estimate.beside_torch)}",
        fix=advise(
            "shorten the sequence or the batch, such as ",
            shorter(estimate.setting),
            "; if the budget is what torch may allocate, the context aside, ignore this rule",
        ),
    )
