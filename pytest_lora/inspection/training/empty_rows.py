"""Tokens of a batch whose row of the vocabulary holds nothing but zeros, as facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.batches import IGNORED
from pytest_lora.facts.steps import EmptyRows
from pytest_lora.inspection.vocabulary import readable_weight


def empty_rows(
    batches: tuple[Any, ...], modules: Mapping[str, nn.Module], base: BaseFacts, padding: int | None
) -> Iterator[EmptyRows]:
    """Rows of zeros of the input embedding that some text reads, and of the head that some label aims at.

    ``padding`` is no such token, as embeddings keep its row at zero (``padding_idx``).
    """
    read, aimed = _used(batches, padding)
    sides = (base.input_embeddings, read), (base.output_embeddings, aimed)
    for name, tokens in sides:
        weight = readable_weight(modules.get(name or ""))
        if name is None or weight is None:
            continue
        kept_at_zero = getattr(modules[name], "padding_idx", None)
        rows = sorted(token for token in tokens - {kept_at_zero} if 0 <= token < len(weight))
        if not rows:
            continue
        zero = ~weight[torch.tensor(rows, device=weight.device, dtype=torch.long)].any(dim=1)
        empty = tuple(token for token, is_zero in zip(rows, zero.tolist(), strict=True) if is_zero)
        # All rows zero: a model of which only shapes matter.
        if empty and len(empty) < len(rows):
            yield EmptyRows(module=name, tokens=empty)


def _used(batches: tuple[Any, ...], padding: int | None) -> tuple[set[int], set[int]]:
    read: set[int] = set()
    aimed: set[int] = set()
    for batch in batches:
        if not isinstance(batch, Mapping):
            continue
        ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_meta:
            continue
        seen = (
            mask.bool()
            if isinstance(mask, Tensor) and mask.shape == ids.shape
            else torch.ones_like(ids).bool()
        )
        read |= set(ids[seen].tolist())
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            aimed |= set(labels[labels != IGNORED].tolist())
    return read - {padding}, aimed - {padding}
