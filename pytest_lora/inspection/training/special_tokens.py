"""The special tokens of a model, and where texts of a batch begin and end by them, as facts.

What stands in place of labels there is told too; the configuration also says of positions how many there are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.batches import IGNORED, LabelKind, TextBounds
from pytest_lora.inspection.base import embeddings_of
from pytest_lora.inspection.behaviour.texts import text_config
from pytest_lora.inspection.transformers_internals import reads_both_ways

PLAIN_TEXT = {"input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "num_items_in_batch"}
"""What a batch of nothing but texts holds, in which tokens and positions are the same in number."""

FEW = 2
"""Tokens at the end of a row in which an end token may stand: chat templates write a line break behind theirs."""


class Vocabulary(NamedTuple):
    """Special tokens and sizes that a model's configuration states.

    ``stops`` are the tokens at which ``generate`` ends, ``opens`` is the begin token of a base that cannot do without
    it, ``positions`` the length that rotary positions were trained for and are not rescaled beyond.
    """

    task: str | None
    rows: int | None
    outputs: int | None
    classes: int | None
    pad: int | None
    begin: int | None
    decoder_start: int | None
    ends: tuple[int, ...]
    single_label: bool
    both_ways: bool
    stops: tuple[int, ...]
    opens: int | None
    positions: int | None


def vocabulary(root: nn.Module, base: BaseFacts) -> Vocabulary:
    """Read the configuration of a base."""
    config: Any = getattr(root, "config", None)
    pad = getattr(config, "pad_token_id", None)
    begin = getattr(config, "bos_token_id", None)
    start = getattr(config, "decoder_start_token_id", None)
    head = embeddings_of(root, "output")
    # A head that PEFT ties to an embedding in modules_to_save states its two sizes the wrong way round in the copy.
    outputs = getattr(getattr(head, "original_module", head), "out_features", None) or base.vocab_size
    classes = getattr(config, "num_labels", None)
    problem = getattr(config, "problem_type", None)
    composed = base.architecture.endswith("EncoderDecoderModel")
    return Vocabulary(
        task="SEQ_2_SEQ_LM" if composed else base.task_type,
        rows=base.vocab_size,
        outputs=outputs,
        classes=classes if isinstance(classes, int) else None,
        pad=pad if isinstance(pad, int) else None,
        begin=begin if isinstance(begin, int) else None,
        # Labels for two models put together usually begin with their tokenizer's [CLS], which starts the decoder too.
        decoder_start=start if isinstance(start, int) and not composed else None,
        ends=_ends(config),
        # With one output and nothing said, transformers takes the labels for numbers.
        single_label=problem == "single_label_classification" or (problem is None and classes != 1),
        both_ways=reads_both_ways(config),
        stops=tuple(dict.fromkeys((*_ends(config), *_ends(getattr(root, "generation_config", None))))),
        opens=begin if isinstance(begin, int) and _NEEDS_BEGIN.fullmatch(_family(root)) else None,
        positions=_rotary_positions(root),
    )


_NEEDS_BEGIN = re.compile(r"gemma\d*n?(_text)?")
"""Families whose bases give nonsense without a begin token. Of Gemma, Google's model cards and its tokenizers say so
(https://unsloth.ai/blog/gemma-bugs measured it); T5Gemma and others that merely have the name are none of them."""


def _family(root: nn.Module) -> str:
    return str(getattr(text_config(root), "model_type", ""))


def _ends(config: Any) -> tuple[int, ...]:
    end = getattr(config, "eos_token_id", None)
    return tuple(int(e) for e in (end if isinstance(end, (list, tuple)) else () if end is None else (end,)))


def _rotary_positions(root: nn.Module) -> int | None:
    """Positions of a model whose rotary embedding goes on beyond them without a word; None for any other.

    Learned positions raise there, and those that a configuration rescales ("linear", "dynamic", "yarn") are meant to go
    further.
    """
    config: Any = text_config(root)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = rope if isinstance(rope, Mapping) else {}
    # Models whose layers look near or far have one for each kind of layer.
    each = [r for r in rope.values() if isinstance(r, Mapping)] or [rope]
    kinds = {r.get("rope_type", r.get("type", "default")) for r in each}
    rotates = any(type(module).__name__.endswith("RotaryEmbedding") for module in root.modules())
    positions = getattr(config, "max_position_embeddings", None)
    return positions if rotates and kinds <= {"default", None} and isinstance(positions, int) else None


def text_bounds(
    kind: LabelKind,
    labels: Tensor,
    ids: Tensor | None,
    batch: Mapping[str, Any],
    words: Vocabulary,
) -> TextBounds:
    """Facts on the beginnings and the ends of texts.

    Args:
        kind: What the labels mean to the model.
        labels: Shape ``[rows, positions]``, or ``[rows]`` of classes.
        ids: ``input_ids`` of shape ``[rows, positions]``, or None.
        batch: What else the model gets.
        words: Special tokens and sizes of the model.
    """
    filler, filled = _filler(labels, ids) if kind == "causal" and ids is not None else (None, 0.0)
    crossing, firsts = _crossing(labels, batch) if kind == "causal" else (0, 0)
    finished, closed, last = _closed(labels, ids, batch, words.stops) if kind == "causal" else (0, 0, set())
    return TextBounds(
        filler=filler,
        filled=filled,
        started=_started(labels, words.decoder_start) if kind == "sequence" else 0,
        start=words.decoder_start,
        crossing=crossing,
        crossing_tokens=firsts,
        finished=finished,
        closed=closed,
        last_tokens=len(last),
        last=next(iter(last)) if len(last) == 1 else None,
        prompted=_prompted(labels, batch) if kind == "causal" else 0,
        opens=words.opens,
        opened=0 if ids is None or words.opens is None else int((ids == words.opens).any(1).sum()),
        hidden=_hidden(labels, ids) if kind == "causal" and ids is not None else 0.0,
        header=_headers(labels, ids, batch) if kind == "causal" and ids is not None else 0,
        furthest=0 if ids is None or kind != "causal" else _furthest(ids, batch),
        positions=words.positions,
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
) -> tuple[int, int, set[int]]:
    """Rows whose text ends before the row does, those of them with an end token there, and their last tokens.

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
        return 0, 0, set()
    finished, closed, last = 0, 0, set[int]()
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
    return finished, closed, last


def _hidden(labels: Tensor, ids: Tensor) -> float:
    """Share of labels that stand where the input is one token, mostly another than the label, as a mask token is."""
    counted = labels != IGNORED
    inputs = ids[counted & (labels != ids)].tolist()
    if not inputs:
        return 0.0
    ((token, _),) = Counter(inputs).most_common(1)
    return float((ids[counted] == token).float().mean())


HEADER = 3
"""Tokens of the header of an answer that are compared: chat templates have as many, and texts rarely end with those."""


def _headers(labels: Tensor, ids: Tensor, batch: Mapping[str, Any]) -> int:
    """Rows that end with the tokens which come before their first label: a header with no answer behind it."""
    mask, found = batch.get("attention_mask"), 0
    text = mask.cpu() != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else ids == ids
    for row, counted in enumerate(labels != IGNORED):
        places = counted.nonzero().flatten()
        first = int(places[0]) if len(places) else 0
        last = ids[row][text[row]][-HEADER:].tolist()
        before = ids[row, max(0, first - HEADER) : first].tolist()
        found += len(set(before)) > 1 and len(before) == HEADER and before == last
    return found


def _furthest(ids: Tensor, batch: Mapping[str, Any]) -> int:
    """How many positions the longest text takes, padding aside; of packed ones, the longest document."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not set(batch) <= PLAIN_TEXT:
        return 0
    if isinstance(positions, Tensor):
        return int(positions.max()) + 1 if positions.shape == ids.shape else 0
    if isinstance(mask, Tensor):
        return int((mask != 0).sum(1).max()) if mask.shape == ids.shape else 0
    return ids.shape[1]


def _prompted(labels: Tensor, batch: Mapping[str, Any]) -> int:
    """Rows in which at least two tokens of the text come before the first label."""
    mask = batch.get("attention_mask")
    counted = labels != IGNORED
    text = mask.cpu().bool() if isinstance(mask, Tensor) and mask.shape == labels.shape else counted | True
    before = (text & ~counted).long().cumsum(1)
    return int((before.gather(1, counted.long().argmax(1, keepdim=True)) >= FEW)[counted.any(1)].sum())
