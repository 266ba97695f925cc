"""What keeps gradients from an adapter, as far as facts tell."""

from __future__ import annotations

from pytest_lora.facts.layer_state import LayerState
from pytest_lora.facts.training import TrainingFacts


def why_silent(facts: TrainingFacts, layer: LayerState) -> str | None:
    """What keeps gradients from one adapter on one module, where that can be told."""
    if layer.disabled:
        return "adapters are disabled (disable_adapters or disable_adapter_layers)"
    if layer.merged:
        return "the adapter is merged into the base weights"
    if not layer.trainable:
        return "its tensors are frozen (requires_grad=False)"
    embeds = "inputs_embeds" in facts.inputs
    if layer.module in facts.untouched:
        outside = "the module is outside the forward pass"
        past = embeds and layer.module == facts.model.base.input_embeddings
        return f"{outside}: inputs_embeds come from outside, past the embeddings" if past else outside
    if layer.module in facts.cut:
        why = "reentrant gradient checkpointing runs it without a graph: no input of its block requires gradients"
        return (
            f"{why}, as inputs_embeds come from outside, past the hook on the embeddings" if embeds else why
        )
    if layer.module in facts.without_graph and facts.has_graph:
        return "it runs under torch.no_grad()"
    if facts.model.reentrant_without_inputs:
        return "reentrant gradient checkpointing without input gradients cuts the graph"
    if layer.scaling == 0:
        return f"lora_alpha={layer.alpha:g}: the scaling is 0"
    if layer.dropout >= 1:
        return "lora_dropout=1 drops every input"
    if layer.b.zero and not layer.b.trainable:
        return f"{layer.b.name} is zero and frozen"
    if layer.a.zero and layer.b.zero:
        return f"{layer.a.name} and {layer.b.name} are both zero"
    return None
