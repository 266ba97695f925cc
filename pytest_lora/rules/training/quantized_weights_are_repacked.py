from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA334", severity="error", needs=TrainingFacts)
def quantized_weights_are_repacked(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """4-bit weights were repacked for inference, so that gradients through them are wrong.

    ## What it does
    Looks for 4-bit layers on a CPU whose weight bitsandbytes has brought into its packing for inference.

    ## Why is this bad?
    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight in place at the first forward pass in
    evaluation mode. A training step after that reads the new packing as the old one: the loss is right,
    its gradients are not.

    ## Example
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]))
    report = check_training(model, batch)
    ```

    ## References
    - https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1827
    """
    if facts.repacked and expect.purpose == "train":
        yield Violation(
            where=grouped(facts.repacked),
            observed="4-bit weights are in the packing of bitsandbytes for CPU inference: gradients are wrong",
            expected="weights as they were quantized",
            fix="load the base anew and evaluate in training mode, or set support_avx512bf16_for_cpu to False on "
            "every Linear4bit before the first evaluation",
        )
