"""How many features a module takes and gives, however it stores its weights."""

from __future__ import annotations

from typing import Any

from torch import nn


def logical_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a module that LoRA can adapt, before any packing; else None."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    if type(module).__name__ == "Conv1D":
        weight: Any = module.weight
        return int(weight.shape[0]), int(weight.shape[1])
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and _has_weight(module):
        return sizes[0], sizes[1]
    return None


def _has_weight(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("weight", "qweight", "W_q"))
