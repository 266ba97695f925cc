"""The texts in batches that have company in their row: padding, or other documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytest_lora.facts.batches import IGNORED, Company

_TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "num_items_in_batch"}
_DECODER = {"decoder_input_ids", "decoder_attention_mask"}
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What batches of text hold, those of encoder-decoders beside it, and packed ones (``DataCollatorWithFlattening``). Of
other inputs nobody knows what belongs to one text."""

_LEAST = 2
"""Tokens of a document below which it is taken for padding: padded positions often are all zero."""

_RUN = 3
"""Length of the longest run of one token that is taken for padding though nothing says that it is."""


class Text(NamedTuple):
    """A text in a row of a batch: its tokens are those from ``start`` to ``stop``."""

    batch: int
    row: int
    start: int
    stop: int
    length: int
    company: Company
    filler: int | None


def texts_of(batches: Mapping[int, Any], root: nn.Module) -> Iterator[Text | None]:
    """A text of each batch of a known form that has company; None for one in which no text has."""
    for index, batch in batches.items():
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        known = _TEXT | PACKED | (_DECODER if is_encoder_decoder(root) else set())
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_meta and set(batch) <= known:
            packed = _numbers(ids, batch) is not None or _restarts(ids, batch)
            yield _packed(index, ids, batch) if packed else _padded(index, ids, batch, root)


def _numbers(ids: Tensor, batch: Mapping[str, Any]) -> list[list[int]] | None:
    """A mask that numbers the documents of its rows (1, 2, 3), as collators for a patched flash attention make it."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or mask.is_floating_point():
        return None
    rises = mask[:, 1:] - mask[:, :-1] == 1
    return mask.tolist() if bool((rises & (mask[:, :-1] > 0)).any()) else None


def _restarts(ids: Tensor, batch: Mapping[str, Any]) -> bool:
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != ids.shape:
        return False
    return bool(((positions[:, 1:] == 0) & (positions[:, :-1] != 0)).any())


def _packed(index: int, ids: Tensor, batch: Mapping[str, Any]) -> Text | None:
    """The first document that stands behind another one: as much of it as lets both runs fit into the row.

    Nothing is cut where lengths are counted through the whole batch.
    """
    length, numbers = ids.shape[1], _numbers(ids, batch)
    for row, marks in enumerate(numbers or batch["position_ids"].tolist()):
        starts = [
            t for t in range(length) if (marks[t] != marks[t - 1] or not t if numbers else marks[t] == 0)
        ]
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            if not set(batch) & PACKED:
                stop = min(stop, start + max(_LEAST, (length - start) // 2))
            counts = numbers or marks[start:stop] == list(range(stop - start))
            text = Text(index, row, start, stop, length, "documents", None)
            if start and counts and stop - start >= _LEAST and mask_of(batch, text, inside=True) != "hides":
                return text
    return None


def _padded(index: int, ids: Tensor, batch: Mapping[str, Any], root: nn.Module) -> Text | None:
    """The shortest text that has padding beside it."""
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return None
    real = mask != 0 if mask is not None and not bool(mask.all()) else _unfilled(ids, batch, root)
    spans = []
    for row, marks in enumerate(real.tolist()):
        start, count = (marks.index(True), sum(marks)) if any(marks) else (0, 0)
        if 0 < count < len(marks) and all(marks[start : start + count]):
            spans.append((count, row, start))
    if not spans:
        return None
    count, row, start = min(spans)
    fillers = set(ids[row][~real[row]].tolist())
    filler = fillers.pop() if len(fillers) == 1 else None
    return Text(index, row, start, start + count, ids.shape[1], "padding", filler)


def _unfilled(ids: Tensor, batch: Mapping[str, Any], root: nn.Module) -> Tensor:
    """Where no padding stands, although no mask says so.

    Padding is the run of ``pad_token_id`` at an end of a row, or else of one token that ends rows in runs of several
    lengths, of which nothing is a target.
    """
    labels, pad = batch.get("labels"), pad_token(root)
    aimed = labels != IGNORED if isinstance(labels, Tensor) and labels.shape == ids.shape else ids < 0
    best = torch.ones_like(ids, dtype=torch.bool)
    for token in {pad} if pad is not None else {*ids[:, 0].tolist(), *ids[:, -1].tolist()}:
        filled = (_run(ids, token) | _run(ids.flip(1), token).flip(1)) & ~aimed
        lengths = set(filled.sum(1).tolist())
        sure = pad is not None or (len(lengths) > 1 and max(lengths) >= _RUN)
        if sure and max(lengths) >= _LEAST and int(filled.sum()) > int((~best).sum()):
            best = ~filled
    return best


def _run(ids: Tensor, token: int) -> Tensor:
    """The run of a token that a row begins with."""
    return (ids == token).long().cumprod(1).bool()


def mask_of(batch: Mapping[str, Any], text: Text, *, inside: bool = False) -> Any:
    """Whether the mask "hides" a position of the row, or of the text itself, "shows" all, or there is "none".

    Of a row in which it "numbers" the documents, that is told.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        return "none"
    if mask.ndim != 2:
        return "shows"
    row, own = mask[text.row] == 0, slice(text.start, text.stop)
    if inside:
        return "hides" if bool(row[own].any()) else "shows"
    if text.company == "documents" and not mask.is_floating_point() and bool((mask[text.row] > 1).any()):
        return "numbers"
    return "hides" if bool(row.any()) else "shows"


def is_encoder_decoder(root: nn.Module) -> bool:
    """Whether a transformers model says of itself that it is one."""
    return bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))


def pad_token(root: nn.Module) -> int | None:
    """The number of the padding token, where the configuration has one."""
    pad = getattr(text_config(root), "pad_token_id", None)
    return pad if isinstance(pad, int) else None


def text_config(root: nn.Module) -> Any:
    """The configuration of the part that reads text; the whole one where several parts do (MusicGen)."""
    config: Any = getattr(root, "config", None)
    get = getattr(config, "get_text_config", None)
    try:
        return get() if get else config
    except ValueError:
        return config
