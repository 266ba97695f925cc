"""Facts about the labels of a batch, and the inputs that they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

IGNORED = -100
"""The label that ``torch.nn.functional.cross_entropy`` leaves out by default."""

COPIED = 0.95
"""Share of labels equal to the input at their place, or at the next one, from which on they are a copy of it."""

LabelKind = Literal["causal", "sequence", "tokens", "classes"]
"""Next-token labels that the model shifts itself, labels of a decoder, one class a token, one class a row."""


@dataclass(frozen=True, slots=True)
class TextBounds:
    """Where the texts of a batch begin and end.

    Attributes:
        filler: The token that most labels of a causal model are which differ from the input at their place, or None.
        filled: Its share of the labels that count.
        started: Rows of a decoder's labels that begin with the token which the model puts before them.
        start: That token, ``decoder_start_token_id``, or None.
        crossing: Labels at the first token of a document behind another one in its row.
        crossing_tokens: How many different tokens these are.
        finished: Rows whose text ends before the row does, its last token a target.
        closed: Rows, of those whose last token is a target, that have an end token there.
        last_tokens: How many different tokens those rows end with.
        prompted: Rows whose first tokens have no label, and later ones have.
        last: The token that all those rows end with, or None.
        opens: The begin token of a base that cannot do without it, or None.
        opened: Rows that hold that token.
        hidden: Share of the labels of a causal model at places where the input is one and the same other token.
        header: Rows that end with the three tokens that come before their first label.
        furthest: Positions that the longest text or packed document takes.
        positions: Those that the base was trained for, where it goes beyond them without an error, or None.
    """

    filler: int | None
    filled: float
    started: int
    start: int | None
    crossing: int
    crossing_tokens: int
    finished: int
    closed: int
    last_tokens: int
    prompted: int
    last: int | None = None
    opens: int | None = None
    opened: int = 0
    hidden: float = 0.0
    header: int = 0
    furthest: int = 0
    positions: int | None = None


@dataclass(frozen=True, slots=True)
class LabelFacts:
    """The labels of one batch.

    Attributes:
        batch: Index of the batch.
        kind: What they mean to the model.
        labels: How many count, after the shift of a causal model.
        total: How many there are, after that shift.
        unlabelled: How many positions that are attended to have no label.
        rows: Rows of the batch.
        rows_ignored: Rows in which no label counts.
        padding: Labels that count at positions which are padding.
        padding_by: ``"attention_mask"``, ``"pad_token_id"`` or ``"eos_token_id"``: what tells the padding.
        ends: End tokens among the inputs of a causal model that close a text whose last token is a target.
        padding_ends: The same where the end token itself is padding by the attention mask.
        end_targets: End tokens among the labels that count.
        limit: Number of classes or vocabulary rows, or None where unknown.
        outside: Labels that are no class, each once: negative (but -100) or not below the limit.
        ids_limit: Rows of the input embedding, or None.
        ids_outside: Input ids that have no row, each once.
        same: Share of labels equal to the input at their own position.
        ahead: Share of labels equal to the input one position later.
        behind: Share of labels equal to the input one position earlier.
        masked_inputs: Whether one and the same token stands in the input wherever a label counts.
        attended_padding: Rows in which padding that the model does look at is attended to.
        padded_at: Where that padding stands in the row.
        double_starts: Rows that begin with two begin tokens (bos).
        still_positions: Rows whose ``position_ids`` are one and the same number throughout.
        visible: Share of labels that ``decoder_input_ids`` hold at their own position, so that the decoder reads them.
        bounds: Where the texts begin and end.
    """

    batch: int
    kind: LabelKind
    labels: int
    total: int
    unlabelled: int
    rows: int
    rows_ignored: int
    padding: int
    padding_by: str
    ends: int
    padding_ends: int
    end_targets: int
    limit: int | None
    outside: tuple[int, ...]
    ids_limit: int | None
    ids_outside: tuple[int, ...]
    same: float
    ahead: float
    behind: float
    masked_inputs: bool
    attended_padding: int
    padded_at: Literal["left", "right"]
    double_starts: int
    still_positions: int
    visible: float
    bounds: TextBounds


@dataclass(frozen=True, slots=True)
class WholeTargets:
    """Labels of a classifier with one output, which transformers takes for numbers, that are whole numbers.

    Attributes:
        batch: Index of the batch.
        rows: Rows of the batch.
        values: The labels, each once, the smallest first.
    """

    batch: int
    rows: int
    values: tuple[int, ...]


def named_batches(found: Iterable[LabelFacts]) -> str:
    """The batches that these labels belong to, the first eight of them, in words."""
    return "batches " + ", ".join(str(known.batch) for known in islice(found, 8))
