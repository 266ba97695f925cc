"""Facts about the batches of a training: labels, answers, media, and a text in its batch against the text alone."""

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


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """The answers of one batch, compared two by two or given with a mask of their own.

    Attributes:
        batch: Index of the batch.
        named: Inputs that tell which tokens are answers: ``"chosen_labels, rejected_labels"``, ``"completion_mask"``.
        rows: Pairs of answers; of a mask its rows.
        empty: Those in which an answer has no token that counts.
        same: Pairs whose two texts are the same tokens.
    """

    batch: int
    named: str
    rows: int
    empty: int
    same: int


Medium = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class MediumFacts:
    """One medium in one batch: its placeholders in ``input_ids``, and what came with them.

    Attributes:
        batch: Index of the batch.
        medium: Which.
        token: The placeholder token.
        field: Field of the model's configuration that says so: ``"image_token_id"``.
        placeholders: How often the token stands in ``input_ids``.
        rows: Rows that it stands in.
        inputs: Inputs of the batch that hold the medium itself.
        wanted: Placeholders that the grids of the batch (``image_grid_thw``) ask for, or None where there are none.
        grid: Name of that input; empty where there is none.
        targets: Labels that are the token, after the shift of a causal model.
        of_targets: Labels that count, after that shift.
        types: Name of the input that says which tokens are of which medium, where the model takes one.
        untyped: Placeholders that this input calls text; None where the batch does not hold it.
        flat: Whether ``position_ids`` came with it that give each placeholder one number, where the model's positions
            have three (time, height and width).
        raw: Inputs of the medium that hold whole numbers up to 255, as a file of an image does.
    """

    batch: int
    medium: Medium
    token: int
    field: str
    placeholders: int
    rows: int
    inputs: tuple[str, ...]
    wanted: int | None
    grid: str
    targets: int
    of_targets: int
    types: str
    untyped: int | None
    flat: bool = False
    raw: tuple[str, ...] = ()


Company = Literal["padding", "documents"]
Side = Literal["left", "right", "both"]


@dataclass(frozen=True, slots=True)
class AloneFacts:
    """What a text gives alone, and what it gives in its batch, in evaluation mode.

    Attributes:
        batch: Index of the batch.
        row: Row of the text.
        tokens: Tokens of the text.
        company: What else is in its row: padding, or other documents packed into it.
        side: Where that stands.
        pooled: Whether the model gives one result for the row instead of one for each token.
        apart: How far the results are apart, relative to the largest of those alone: the median over the tokens of
            their largest difference.
        tolerance: What rounding may make of it.
        mask: ``"hides"``: ``attention_mask`` is 0 over what else is in the row; ``"shows"``: it is not; ``"numbers"``:
            it counts the documents; ``"none"``.
        positions: Whether the batch brings ``position_ids``.
        filler: Token of the padding, or None where it has none of its own.
        pad: ``pad_token_id`` that the model knows, or None.
        cached: Whether the cache of keys and values was on in the batch, as it is where nobody turns it off. Packed
            documents are then compared again that were the same without it.
    """

    batch: int
    row: int
    tokens: int
    company: Company
    side: Side
    pooled: bool
    apart: float
    tolerance: float
    mask: Literal["hides", "shows", "numbers", "none"]
    positions: bool
    filler: int | None
    pad: int | None
    cached: bool

    @property
    def holds(self) -> bool:
        """Whether the text gives the same in its batch as alone."""
        return self.apart <= self.tolerance
