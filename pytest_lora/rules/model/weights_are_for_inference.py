from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA239", severity="error", needs=ModelFacts)
def weights_are_for_inference(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Weights were made under `torch.inference_mode()`, and autograd never tracks such.

    ## What it does
    Looks for inference tensors among the parameters of the base and of trainable adapters. For
    `Expect(purpose="eval")` and `"inference"` they are as they should be.

    ## Why is this bad?
    Such tensors stay what they are outside of that mode: an adapter made of them gets no gradient, and a base of
    them stops the backward pass with "Inference tensors cannot be saved for backward". It happens where a helper
    that loads models for prediction also loads the one to train.

    ## Example
    ```python
    with torch.inference_mode():
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
    """
    if expect.purpose != "train":
        return
    adapted = [
        layer.module for layer in facts.layers if layer.trainable and any(f.is_inference for f in layer.parts)
    ]
    if names := (*dict.fromkeys(adapted), *facts.inference_base):
        what = " and ".join(["adapters"] * bool(adapted) + ["base weights"] * bool(facts.inference_base))
        yield Violation(
            where=grouped(names),
            observed=f"{what} are inference tensors, made under torch.inference_mode(): no gradient is ever computed",
            expected="ordinary tensors in a model that trains",
            fix="build the model and its adapter outside of inference mode, which torch.inference_mode sets",
        )
