"""The only place that touches what transformers does not document as public."""

from __future__ import annotations

from torch import nn

from pytest_lora.inspection.survey import Survey


def reentrant_without_inputs(found: Survey) -> bool:
    """Whether reentrant checkpointing is on while nothing makes the embeddings' output require gradients.

    Reentrant checkpointing runs its segment without a graph unless an input requires gradients
    (``torch.utils.checkpoint``); ``enable_input_require_grads`` leaves its hook handles on the model.
    """
    modules = found.modules.values()
    if not any(_checkpoints_reentrant(module) for module in modules):
        return False
    hooked = any("_require_grads_hook" in vars(module) for module in modules)
    embeddings = getattr(found.root, "get_input_embeddings", lambda: None)()
    trains = embeddings is not None and any(p.requires_grad for p in embeddings.parameters())
    return not (hooked or trains)


def _checkpoints_reentrant(module: nn.Module) -> bool:
    if not vars(module).get("gradient_checkpointing", False):
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
