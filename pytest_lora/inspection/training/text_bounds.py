"""Where texts of a batch begin and end, and what stands in place of labels there, as facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_lora.facts.labels import IGNORED, LabelKind, TextBounds

FEW = 2
"""Tokens at the end of a row in which an end token may stand: chat templates write a line break behind theirs."""


def text_bounds(
    kind: LabelKind,
    labels: Tensor,
    ids: Tensor | None,
    batch: Mapping[str, Any],
    *,
    ends: tuple[int, ...],
    start: int | None,
) -> TextBounds:
    """Facts on the beginnings and the ends of texts.

    Args:
        kind: What the labels mean to the model.
        labels: Shape ``[rows, positions]``, or ``[rows]`` of classes.
        ids: ``input_ids`` of shape ``[rows, positions]``, or None.
        batch: What else the model gets.
        ends: End tokens of the model.
        start: The token that an encoder-decoder puts before the labels, or None.
    """
    filler, filled = _filler(labels, ids) if kind == "causal" and ids is not None else (None, 0.0)
    crossing, firsts = _crossing(labels, batch) if kind == "causal" else (0, 0)
    finished, closed, last = _closed(labels, ids, batch, ends) if kind == "causal" else (0, 0, 0)
    return TextBounds(
        filler=filler,
        filled=filled,
        started=_started(labels, start) if kind == "sequence" else 0,
        start=start,
        crossing=crossing,
        crossing_tokens=firsts,
        finished=finished,
        closed=closed,
        last_tokens=last,
        prompted=_prompted(labels, batch) if kind == "causal" else 0,
    )


def _filler(labels: Tensor, ids: Tensor) -> tuple[int | None, float]:
    """The token that most labels are which are not the input at their place, and its share of all labels."""
    counted = labels != IGNORED
    other = labels[counted & (labels != ids)]
    if not len(other):
        return None, 0.0
    ((token, number),) = Counter(other.tolist()).most_common(1)
    return token, number / int(counted.sum())


def _started(labels: Tensor, start: int | None) -> int:
    """Rows whose first label is the token that the model puts before them anyway."""
    if start is None or labels.ndim != 2 or labels.shape[1] < 2:
        return 0
    # A row of nothing else is padding.
    return int(((labels[:, 0] == start) & (labels[:, 1] != start) & (labels[:, 1] != IGNORED)).sum())


def _crossing(labels: Tensor, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Labels at the first token of a document behind another one, and how many different tokens they are."""
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != labels.shape:
        return 0, 0
    positions = positions.cpu()
    begins = torch.zeros_like(labels, dtype=torch.bool)
    # Padded positions often are all zero: a document counts on.
    begins[:, 1:-1] = (positions[:, 1:-1] == 0) & (positions[:, :-2] != 0) & (positions[:, 2:] == 1)
    found = labels[begins & (labels != IGNORED)]
    return len(found), len(set(found.tolist()))


def _closed(
    labels: Tensor, ids: Tensor | None, batch: Mapping[str, Any], ends: tuple[int, ...]
) -> tuple[int, int, int]:
    """Rows whose text ends before the row does, those of them with an end token there, and different last tokens.

    A text that fills its row may have been cut off. The last token has to be a target.
    """
    mask = batch.get("attention_mask")
    if (
        ids is None
        or not ends
        or not isinstance(mask, Tensor)
        or mask.shape != ids.shape
        or "position_ids" in batch
    ):
        return 0, 0, 0
    finished, closed, last = 0, 0, set()
    for row, seen in enumerate(mask.cpu().bool()):
        known = seen.nonzero().flatten()
        whole = len(known) == len(seen)
        if not len(known) or labels[row, known[-1]] == IGNORED:
            continue
        tail = ids[row, known[-FEW:]].tolist()
        # A mask made as input_ids != pad hides an end token that also pads.
        behind = [] if int(known[-1]) + 1 == len(seen) else [int(ids[row, known[-1] + 1])]
        finished += not whole
        closed += bool({*tail, *behind} & set(ends))
        last.add(tail[-1])
    return finished, closed, len(last)


def _prompted(labels: Tensor, batch: Mapping[str, Any]) -> int:
    """Rows in which at least two tokens of the text come before the first label."""
    mask = batch.get("attention_mask")
    counted = labels != IGNORED
    text = mask.cpu().bool() if isinstance(mask, Tensor) and mask.shape == labels.shape else counted | True
    before = (text & ~counted).long().cumsum(1)
    return int((before.gather(1, counted.long().argmax(1, keepdim=True)) >= FEW)[counted.any(1)].sum())
