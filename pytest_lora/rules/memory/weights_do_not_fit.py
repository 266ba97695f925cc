from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.memory import MemoryFacts
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.memory import advice, largest_parts, left_whole, may_need_less, step_in_words

_WEIGHTS = (
    "parameter shards",
    "gathered parameters",
    "reduce buffers",
    "buckets",
    "base weights",
    "quantized base weights",
    "quantization statistics",
    "embeddings and head",
    "adapters",
)


@rule("LORA501", severity="error", needs=MemoryFacts)
def weights_do_not_fit(facts: MemoryFacts, expect: Expect) -> Iterator[Violation]:
    """The model does not fit the memory of the GPU, before a single step is taken.

    ## What it does
    Compares what is allocated once base and adapter are loaded, or on the way to it, with the budget. ZeRO-3 divides a
    quantized base only after each GPU had it as a whole.

    ## Why is this bad?
    Loading the model runs out of memory. Neither a smaller batch nor a shorter sequence helps.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(llama_7b, config, batch_size=1, seq_len=512, budget="22GiB", dtype="float32")
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    report = check_memory(llama_7b, config, batch_size=1, seq_len=512, budget="22GiB", dtype="bfloat16")
    ```

    ## References
    - Anatomy of a model's memory: https://huggingface.co/docs/transformers/model_memory_anatomy
    """
    estimate = facts.estimate
    if estimate.peak_loading <= facts.budget or may_need_less(estimate):
        return
    if estimate.loaded <= facts.budget:
        yield _divided_too_late(facts)
        return
    yield Violation(
        where=step_in_words(estimate),
        observed=f"the loaded model weights need {format_bytes(estimate.loaded)}, "
        f"{format_bytes(estimate.loaded - facts.budget)} more than the budget: "
        f"{largest_parts(estimate, _WEIGHTS)}{left_whole(estimate)}",
        expected=f"weights below the budget of {format_bytes(facts.budget)}, with room for a step",
        fix=advice(facts),
    )


def _divided_too_late(facts: MemoryFacts) -> Violation:
    estimate = facts.estimate
    return Violation(
        where=step_in_words(estimate),
        observed=f"while it is loaded, the model needs {format_bytes(estimate.loading)} on each GPU, "
        f"{format_bytes(estimate.loading - facts.budget)} more than the budget: it is divided afterwards, to "
        f"{format_bytes(estimate.loaded)}",
        expected=f"no more than the budget of {format_bytes(facts.budget)} before the model is divided",
        fix='take strategy="fsdp", which divides it in the host\'s memory, or larger cards; more of them do not help',
    )
