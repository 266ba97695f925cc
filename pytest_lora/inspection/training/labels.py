"""The labels of a batch, as facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pytest_lora.facts.batches import IGNORED, LabelFacts, LabelKind
from pytest_lora.facts.steps import TaughtFacts
from pytest_lora.inspection.training.special_tokens import Vocabulary, text_bounds

ALIKE = 0.95
"""Share of labels equal to inputs from which on a model of unknown class is taken for a language model."""

_KINDS: dict[str | None, LabelKind] = {
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "sequence",
    "TOKEN_CLS": "tokens",
    "SEQ_CLS": "classes",
}


def label_facts(batches: tuple[Any, ...], words: Vocabulary) -> Iterator[LabelFacts]:
    """Facts on each batch whose labels are of a form that is known."""
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            continue
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.device.type != "meta":
            known = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
            kind = _kind(labels, known, words)
            if kind:
                yield _facts(index, kind, labels.cpu(), None if known is None else known.cpu(), batch, words)


def _kind(labels: Tensor, ids: Tensor | None, words: Vocabulary) -> LabelKind | None:
    if words.task is not None:
        kind = _KINDS.get(words.task)
        fits = labels.ndim == (1 if kind == "classes" else 2) and (kind != "classes" or words.single_label)
        if kind == "causal" and (ids is None or labels.shape != ids.shape):
            return None
        return kind if fits else None
    if ids is None or labels.shape != ids.shape:
        return None
    counted = labels != IGNORED
    alike = counted.any() and (labels == ids)[counted].float().mean() >= ALIKE
    return "causal" if alike else None


def _targets_of(values: Tensor, causal: bool) -> Tensor:
    """What stands at the positions of targets: all but the first of a causal model."""
    return values[:, 1:] if causal else values


def _facts(
    index: int,
    kind: LabelKind,
    labels: Tensor,
    ids: Tensor | None,
    batch: Mapping[str, Any],
    words: Vocabulary,
) -> LabelFacts:
    causal = kind == "causal"
    targets = _targets_of(labels, causal)
    counted = targets != IGNORED
    rows = counted if counted.ndim > 1 else counted[:, None]
    mask = batch.get("attention_mask")
    mask = mask.cpu().bool() if isinstance(mask, Tensor) and mask.shape == labels.shape else None
    padding, padding_by = _padding(kind, labels, ids, mask, words)
    limit = words.classes if kind in ("tokens", "classes") else words.outputs
    ends, padding_ends = _closing(labels, ids if causal else None, mask, words)
    same, ahead, behind = _alignment(labels, ids) if causal and ids is not None else (0.0, 0.0, 0.0)
    attended, side = _attended_padding(kind, labels, ids, batch, words)
    return LabelFacts(
        batch=index,
        kind=kind,
        labels=int(counted.sum()),
        total=targets.numel(),
        unlabelled=int((~counted & (_targets_of(mask, causal) if mask is not None else True)).sum()),
        rows=labels.shape[0],
        rows_ignored=int((~rows.any(dim=1)).sum()),
        padding=int((padding[:, 1:] if causal else padding).sum()),
        padding_by=padding_by,
        ends=ends,
        padding_ends=padding_ends,
        end_targets=int((_is_any(targets, words.ends) & counted).sum()),
        limit=limit,
        outside=_outside(targets[counted], limit),
        ids_limit=words.rows,
        ids_outside=() if ids is None else _outside(ids.flatten(), words.rows),
        same=same,
        ahead=ahead,
        behind=behind,
        masked_inputs=causal and ids is not None and len(set(ids[labels != IGNORED].tolist())) <= 1,
        attended_padding=attended,
        padded_at=side,
        double_starts=_double_starts(ids, mask, words) if causal and ids is not None else 0,
        still_positions=_still_positions(batch),
        visible=_visible(labels, batch) if kind == "sequence" else 0.0,
        bounds=text_bounds(kind, labels, ids, batch, words),
    )


def _outside(values: Tensor, limit: int | None) -> tuple[int, ...]:
    wrong = (values < 0) | (values >= limit) if limit is not None else values < 0
    return tuple(sorted(set(values[wrong].tolist()))[:5])


def _is_any(values: Tensor, tokens: tuple[int, ...]) -> Tensor:
    return torch.isin(values, torch.tensor(tokens, dtype=values.dtype))


def _tail_of(values: Tensor, token: int) -> Tensor:
    """The run of a token that ends each row, where it is at least two long and not the whole row."""
    run = (values.flip(1) == token).long().cumprod(1).flip(1).bool()
    length = run.sum(1, keepdim=True)
    return run & (length >= 2) & (length < values.shape[1])


def _padding(
    kind: LabelKind, labels: Tensor, ids: Tensor | None, mask: Tensor | None, words: Vocabulary
) -> tuple[Tensor, str]:
    """Labels that count although their position is padding, and what says so."""
    nowhere = torch.zeros_like(labels, dtype=torch.bool)
    counted = labels != IGNORED
    if kind == "classes":
        return nowhere, "attention_mask"
    if kind == "sequence":
        tail = nowhere if words.pad is None else _tail_of(labels, words.pad)
        return tail & counted, "pad_token_id"
    if mask is not None and not mask.all():
        # A mask made as input_ids != pad also hides the one end token that a row closes with.
        first = torch.zeros_like(mask)
        first[:, 1:] = mask[:, :-1] & ~mask[:, 1:]
        return ~mask & counted & ~(first & _is_any(labels, words.ends)), "attention_mask"
    if ids is None:
        return nowhere, "pad_token_id"
    if words.pad is None or words.pad in words.ends:
        # The end token pads: the first one of a run of three or more ends the text, the rest is padding.
        for end in words.ends:
            tail = _tail_of(ids, end)
            tail &= tail.sum(1, keepdim=True) >= 3
            nowhere[:, 1:] |= (tail[:, 1:] & tail[:, :-1]) & counted[:, 1:]
        return nowhere, "eos_token_id"
    return _tail_of(ids, words.pad) & counted, "pad_token_id"


_TEXT = {"input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "decoder_input_ids"}
"""What a batch of text alone holds. Beside images, tokens that only keep a place for them look like padding."""


def _attended_padding(
    kind: LabelKind, labels: Tensor, ids: Tensor | None, batch: Mapping[str, Any], words: Vocabulary
) -> tuple[int, Literal["left", "right"]]:
    """Rows with padding that real tokens look at, and on which side it is.

    Padding on the right is behind everything that a causal model predicts. On the left, and for a model that looks both
    ways, nothing but the attention mask hides it.
    """
    if ids is None or words.pad is None or not set(batch) <= _TEXT:
        return 0, "left"
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        return 0, "left"
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    left = _tail_of(ids.flip(1), words.pad).flip(1) & seen
    if kind == "causal":
        left &= labels == IGNORED  # with labels it is padding in the loss
    encoder = kind == "sequence" or words.both_ways
    right = _tail_of(ids, words.pad) & seen if encoder else torch.zeros_like(left)
    rows = int((left | right).any(dim=1).sum())
    return rows, "left" if left.any() else "right"


def _double_starts(ids: Tensor, mask: Tensor | None, words: Vocabulary) -> int:
    """Rows whose text, after any padding on the left, begins with two begin tokens."""
    if words.begin is None or words.begin in (words.pad, *words.ends) or ids.shape[1] < 2:
        return 0
    text = mask
    if text is None or bool(text.all()):
        text = torch.ones_like(ids, dtype=torch.bool) if words.pad is None else ids != words.pad
    first = text.long().argmax(dim=1).clamp(max=ids.shape[1] - 2)
    row = torch.arange(len(ids))
    doubled = (ids[row, first] == words.begin) & (ids[row, first + 1] == words.begin)
    # A row of nothing else, such as torch.ones, is no text.
    return int((doubled & (text & (ids != words.begin)).any(dim=1)).sum())


FEW_POSITIONS = 4
"""Rows shorter than this may well be at one position, as in decoding."""


def _still_positions(batch: Mapping[str, Any]) -> int:
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < FEW_POSITIONS:
        return 0
    return int((positions == positions[:, :1]).all(dim=1).sum())


def _visible(labels: Tensor, batch: Mapping[str, Any]) -> float:
    read = batch.get("decoder_input_ids")
    counted = labels != IGNORED
    if not isinstance(read, Tensor) or read.shape != labels.shape:
        return 0.0
    return _share_equal(read.cpu(), labels, counted)


def _closing(labels: Tensor, ids: Tensor | None, mask: Tensor | None, words: Vocabulary) -> tuple[int, int]:
    """End tokens that close a text whose last token is a target: those that are text, and those that pad."""
    if ids is None or not words.ends:
        return 0, 0
    text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    filler = torch.zeros_like(text)
    for token in (*words.ends, *(() if words.pad is None else (words.pad,))):
        filler |= _tail_of(ids, token)
    last = torch.ones_like(text)
    last[:, :-1] = ~text[:, 1:] | filler[:, 1:]
    answered = torch.zeros_like(text)
    answered[:, 1:] = (labels != IGNORED)[:, :-1] & text[:, :-1]
    closing = _is_any(ids, words.ends) & last & answered
    return int((closing & text).sum()), int((closing & ~text).sum())


def _alignment(labels: Tensor, ids: Tensor) -> tuple[float, float, float]:
    """Shares of labels equal to the input at their place, at the place after it, and at the one before."""
    counted = labels != IGNORED
    return (
        _share_equal(labels, ids, counted),
        _share_equal(labels[:, :-1], ids[:, 1:], counted[:, :-1]),
        _share_equal(labels[:, 1:], ids[:, :-1], counted[:, 1:]),
    )


def _share_equal(left: Tensor, right: Tensor, where: Tensor) -> float:
    return float((left == right)[where].float().mean()) if where.any() else 0.0


def taught_facts(aims: Tensor, batch: Any, known: LabelFacts) -> TaughtFacts | None:
    """Which tokens a loss asks for, by where its gradient at the logits is lowest; None where no position is known.

    Args:
        aims: The token at each position of the logits, -100 where the gradient is below zero nowhere.
        batch: The batch.
        known: Its labels.
    """
    stream = _stream(batch, known)
    if stream is None or aims.shape[0] != len(stream) or not 0 <= stream.shape[1] - aims.shape[1] <= 1:
        return None
    stream, positions = stream.to(aims.device), int((aims != IGNORED).sum())
    read, following, later = (_alike(aims, stream, by) / max(1, positions) for by in range(3))
    return TaughtFacts(positions, read, following, later)


def _stream(batch: Any, known: LabelFacts) -> Tensor | None:
    """The tokens that a model reads one after the other, of a decoder with the label of its last one behind them."""
    if known.kind == "causal":
        ids = batch.get("input_ids")
        return ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
    if known.kind != "sequence" or batch.get("decoder_input_ids") is not None:
        return None
    return nn.functional.pad(batch["labels"], (1, 0), value=NO_TOKEN)


NO_TOKEN = -1
"""Stands for the start token of a decoder, which no loss asks for."""


def _alike(aims: Tensor, stream: Tensor, by: int) -> int:
    """Positions at which the loss asks for the token so many places further on."""
    width = min(aims.shape[1], stream.shape[1] - by)
    asked = aims[:, :width]
    return int(((asked == stream[:, by : by + width]) & (asked != IGNORED)).sum())
