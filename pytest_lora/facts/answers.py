"""Facts about batches of chosen and rejected answers."""

from __future__ import annotations

from dataclasses import dataclass


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
