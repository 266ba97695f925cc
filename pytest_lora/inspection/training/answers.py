"""Chosen and rejected answers of a batch, as facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_lora.facts.batches import IGNORED, AnswerFacts

_SIDES = ("chosen", "rejected")

_MASK = "completion_mask"
"""What TRL calls the mask of answers among ``input_ids``; that of sampled answers alone, beside ``completion_ids``, may
leave out whole rows on purpose (``mask_truncated_completions``)."""

_IDS = ("{}_input_ids", "{}_ids", "{}")
"""What the tokens of chosen answers are called."""


def answer_facts(batches: tuple[Any, ...]) -> Iterator[AnswerFacts]:
    """Facts on each batch of answers whose form is known."""
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            continue
        found = (
            *(_rows(batch.get(f"{side}_labels")) for side in _SIDES),
            *(_ids(batch, side) for side in _SIDES),
        )
        pairs = [rows for rows in found if rows is not None]
        mask, texts = _rows(batch.get(_MASK)), _rows(batch.get("input_ids"))
        if len(pairs) == len(found):
            yield _pairs(index, *pairs)
        elif mask is not None and texts is not None and mask.shape == texts.shape:
            yield AnswerFacts(index, _MASK, len(mask), int((~mask.bool().any(dim=1)).sum()), 0)


def _pairs(
    index: int, chosen: Tensor, rejected: Tensor, chosen_ids: Tensor, rejected_ids: Tensor
) -> AnswerFacts:
    rows = min(len(chosen), len(rejected))
    counted = [(labels[:rows, 1:] != IGNORED).any(dim=1) for labels in (chosen, rejected)]
    same = torch.zeros(rows, dtype=torch.bool)
    if chosen_ids.shape == rejected_ids.shape and chosen.shape == rejected.shape == chosen_ids.shape:
        same = ((chosen_ids == rejected_ids) & (chosen == rejected)).all(dim=1) & counted[0].cpu()
    empty = ~(counted[0] & counted[1])
    return AnswerFacts(index, "chosen_labels, rejected_labels", rows, int(empty.sum()), int(same.sum()))


def _ids(batch: Mapping[str, Any], side: str) -> Tensor | None:
    found = (_rows(batch.get(name.format(side))) for name in _IDS)
    return next((ids for ids in found if ids is not None), None)


def _rows(value: Any) -> Tensor | None:
    fits = isinstance(value, Tensor) and value.ndim == 2 and len(value) > 0 and not value.is_meta
    return value.cpu() if fits and not value.is_floating_point() else None
