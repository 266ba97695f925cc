"""Facts about batches that hold images, videos or audio beside text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
