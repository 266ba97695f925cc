"""Facts about a text on its own against the same text in its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        mask: ``"hides"``: ``attention_mask`` is 0 over what else is in the row; ``"shows"``: it is not; ``"none"``.
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
    mask: Literal["hides", "shows", "none"]
    positions: bool
    filler: int | None
    pad: int | None
    cached: bool

    @property
    def holds(self) -> bool:
        """Whether the text gives the same in its batch as alone."""
        return self.apart <= self.tolerance
