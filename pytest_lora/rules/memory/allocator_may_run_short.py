from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise
from pytest_lora.expect import Expect
from pytest_lora.facts.memory import MemoryFacts
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.memory import beside_in_words, shorter, step_in_words


@rule("LORA504", severity="info", needs=MemoryFacts)
def allocator_may_run_short(facts: MemoryFacts, expect: Expect) -> Iterator[Violation]:
    """A step fits, but the blocks that torch's allocator keeps for later do not fit beside it.

    ## What it does
    Replays the step on CUDA's caching allocator and compares the most that it would reserve, and the CUDA
    context and NCCL, with the budget, where the allocated peak fits.

    ## Why is this bad?
    The allocator then has to give memory back and ask for it again in every step, which is slow, and free
    memory in pieces that are too small may still run out.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(llama_7b, config, batch_size=1, seq_len=512, budget="10.2GiB", quantization="nf4")
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(llama_7b, config, batch_size=1, seq_len=512, budget="16GiB", quantization="nf4")
    ```

    ## References
    - The caching allocator: https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
    """
    estimate = facts.estimate
    if estimate.most_allocated + estimate.beside_torch > facts.budget or estimate.on_device <= facts.budget:
        return
    yield Violation(
        where=step_in_words(estimate),
        observed=f"the allocator would reserve {format_bytes(estimate.peak_reserved)} for a peak of "
        f"{format_bytes(estimate.most_allocated)}, with {beside_in_words(estimate)} beside it, on a budget of "
        f"{format_bytes(facts.budget)}",
        expected="room for what the allocator keeps",
        fix=advise(
            "set PYTORCH_CUDA_ALLOC_CONF to expandable_segments:True, or shorten the sequence, such as ",
            shorter(estimate.setting),
        ),
    )
