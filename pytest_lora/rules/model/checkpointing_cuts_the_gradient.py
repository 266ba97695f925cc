from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA231", severity="error", needs=ModelFacts)
def checkpointing_cuts_the_gradient(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Reentrant gradient checkpointing cuts the adapters off from the loss.

    ## What it does
    Looks for reentrant checkpointing while neither the embeddings train nor a hook makes their output
    require gradients.

    ## Why is this bad?
    Reentrant checkpointing runs each block without a graph unless its input requires gradients. Under a
    frozen embedding it does not: the loss has no grad_fn ("element 0 of tensors does not require grad"), or
    only what lies outside the blocks learns.

    ## Example
    ```python
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    base.get_input_embeddings()._forward_hooks.clear()
    report = check_model(model)
    ```

    ## Use instead
    ```python
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/checkpoint.html
    - https://github.com/huggingface/peft/issues/137
    - https://github.com/huggingface/transformers/issues/42489
    """
    if facts.reentrant_without_inputs and expect.purpose == "train":
        yield Violation(
            where=f"gradient checkpointing of {facts.base.architecture}",
            observed="use_reentrant=True and the embeddings' output requires no gradients, so that none "
            "reaches an adapter",
            expected="checkpointing that keeps the graph of frozen inputs",
            fix="set gradient_checkpointing_kwargs={'use_reentrant': False}, or call "
            "model.enable_input_require_grads()",
        )
