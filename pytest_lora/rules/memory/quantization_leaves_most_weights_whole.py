from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.memory import MemoryFacts
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.memory import step_in_words


@rule("LORA505", severity="warning", needs=MemoryFacts)
def quantization_leaves_most_weights_whole(facts: MemoryFacts, expect: Expect) -> Iterator[Violation]:
    """The base is quantized, yet most of its weights stay as they are.

    ## What it does
    Compares the bytes of quantized weights with those of weights that bitsandbytes cannot pack, embeddings
    and head aside.

    ## Why is this bad?
    bitsandbytes quantizes linear layers only. Experts that are fused into one parameter stay whole, and
    `prepare_model_for_kbit_training` then casts them to float32: the "4-bit" model takes more memory than
    the one in bfloat16.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    report = check_memory(
        fused_moe, config, batch_size=1, seq_len=128, budget="24GiB", quantization="nf4"
    )
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    report = check_memory(fused_moe, config, batch_size=1, seq_len=128, budget="24GiB")
    ```

    ## References
    - What bitsandbytes replaces: https://huggingface.co/docs/transformers/quantization/bitsandbytes
    """
    estimate = facts.estimate
    whole = estimate.breakdown.get("base weights", 0)
    packed = estimate.breakdown.get("quantized base weights", 0)
    if not estimate.is_mostly_whole:
        return
    yield Violation(
        where=step_in_words(estimate),
        observed=f"{format_bytes(packed)} of weights are quantized, {format_bytes(whole)} stay whole",
        expected="most of the base's weights quantized",
        fix="quantize with a method that packs fused experts, or leave the base in bfloat16, quantization=None, and "
        "call neither BitsAndBytesConfig nor prepare_model_for_kbit_training",
    )
