from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model_parts import why_silent
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA312", severity="error", needs=TrainingFacts)
def loss_has_no_graph(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The loss is detached: it depends on nothing that trains.

    ## What it does
    Looks for a loss without a graph although the adapter takes part in the forward pass and is trainable.

    ## Why is this bad?
    `backward()` then raises, or, where something else has a graph, the adapter gets nothing. The forward
    pass ran under `torch.no_grad()`, the model was built under `torch.inference_mode()`, or the loss went
    through `.detach()`, `.item()`, NumPy, or `torch.tensor(loss)`.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, loss_fn=lambda model, batch: model(**batch).loss.detach())
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, loss_fn=lambda model, batch: model(**batch).loss)
    ```

    ## References
    - https://pytorch.org/docs/stable/notes/autograd.html
    """
    detached = [number for number, step in enumerate(facts.steps, 1) if not step.has_graph]
    made_for_inference = any(part.is_inference for layer in facts.model.active_layers for part in layer.parts)
    if detached and any(why_silent(facts, layer) is None for layer in facts.model.active_layers):
        yield Violation(
            where=f"steps {', '.join(map(str, detached))}",
            observed="the loss has no graph (it does not require a gradient): it is detached from the adapter"
            + (", which was made under torch.inference_mode()" if made_for_inference else ""),
            expected="a loss that backward() can follow to the adapter",
            fix="build the model outside of inference mode (torch.inference_mode)"
            if made_for_inference
            else "compute the loss outside of torch.no_grad, and without detach, item or torch.tensor",
        )
