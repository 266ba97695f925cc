from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model_parts import LayerState, at_the_end_of_a_stream, why_silent
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import Severity, grouped
from pytest_lora.rules import Violation, rule


@rule("LORA314", severity="warning", needs=TrainingFacts)
def some_adapters_get_no_gradient(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Some adapters never get a gradient while others do.

    ## What it does
    Looks for modules whose trainable adapter got no gradient, or zero only, at any step, and says why where that
    can be told. An expert that the router chose for no token, a tower whose inputs are in other batches
    than those that steps were taken on, and a projection that only the last block has no use for, are infos.

    ## Why is this bad?
    These adapters cost memory and do nothing: the module is outside the forward pass, behind a
    `.detach()`, in a part of the model that the loss does not depend on, or in a tower whose reentrant
    checkpointing runs it without a graph, as only the text embeddings were made to require gradients.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    def loss_of_first_layer(model, batch):
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
        return hidden.pow(2).mean()

    report = check_training(model, batch, loss_fn=loss_of_first_layer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    if not facts.judges_gradients or not any(t.reached for t in facts.adapter_tensors):
        return
    silent: dict[tuple[str | None, Severity], list[str]] = {}
    unlearning = {layer.module for layer in facts.unlearning if layer.trainable}
    working = {t.module for t in facts.adapter_tensors if t.reached}
    ends = at_the_end_of_a_stream(unlearning, working)
    for layer in facts.unlearning:
        if layer.trainable:
            reason = why_silent(facts, layer)
            # An expert may also run for the last token alone, which predicts nothing.
            optional = (
                layer.module in ends
                or _is_expert(layer.module)
                or (layer.module in facts.untouched and _input_comes_later(facts, layer))
            )
            silent.setdefault((reason, "info" if optional else "warning"), []).append(layer.module)
    for (reason, severity), modules in silent.items():
        yield Violation(
            where=grouped(modules),
            observed=f"no gradient reaches these adapters in {len(facts.steps)} steps, while it reaches others"
            + (f": {reason}" if reason else ""),
            expected="a gradient for every adapter"
            if severity == "warning"
            else "a gradient once a batch makes use of them",
            fix=_fix(facts, reason)
            if severity == "warning"
            else "nothing, if batches of the real run do; else leave these modules out of target_modules",
            severity=severity,
        )


def _fix(facts: TrainingFacts, reason: str | None) -> str:
    if reason is None:
        return (
            "look for detach or torch.no_grad in or behind these modules, or leave them out of target_modules"
        )
    if "checkpointing" in reason:
        return (
            'set gradient_checkpointing_kwargs={"use_reentrant": False}, or make what enters the first of these blocks '
            f"require gradients too: requires_grad_(True) on {_entrance(facts)}"
        )
    if "no_grad" in reason:
        return "run these modules outside of torch.no_grad, or leave them out of target_modules"
    return (
        "leave these modules out of target_modules, give a batch that needs them, or let the forward pass call "
        "them and not their weights"
    )


def _entrance(facts: TrainingFacts) -> str:
    return "inputs_embeds" if "inputs_embeds" in facts.inputs else "the output of their tower's embeddings"


def _is_expert(module: str) -> bool:
    return re.search(r"expert", module) is not None


_TOWERS = {
    r"vision|visual|image|pixel|vit\b": ("pixel", "image", "video"),
    r"audio|speech|sound": ("audio", "input_features", "speech"),
}
"""Names of towers, and of the inputs that they need."""


def _input_comes_later(facts: TrainingFacts, layer: LayerState) -> bool:
    """Whether a module belongs to a tower whose input is in batches that no step was taken on."""
    return any(
        re.search(tower, layer.module) and any(word in name for name in facts.later_inputs for word in words)
        for tower, words in _TOWERS.items()
    )
