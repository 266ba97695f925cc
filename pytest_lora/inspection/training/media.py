"""Images, videos and audio of a batch, and their placeholders among its tokens, as facts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pytest_lora.facts.batches import IGNORED, Medium, MediumFacts

_INPUTS: dict[Medium, str] = {
    "image": r"image|pixel_values(?!_videos)",
    "video": r"video|pixel_values",  # some models take frames as images
    "audio": r"audio|speech|input_features|input_values",
}
"""What inputs of a medium are called in the forward methods of transformers."""

_TYPES = "mm_token_type_ids"
"""The input that is above 0 wherever a token stands for a medium (``ProcessorMixin.create_mm_token_type_ids``)."""

_RENAMED = {"gemma3": "token_type_ids"}
"""Types of models whose processor calls it otherwise; elsewhere ``token_type_ids`` tell other things apart."""

_RAW = 64.0
"""Above this no image is that went through a processor, which divides by 255 and by a deviation of 0.2 to 0.5."""


class Placeholder(NamedTuple):
    """A token that keeps the place of a medium."""

    medium: Medium
    token: int
    field: str


def placeholders_of(root: nn.Module) -> tuple[Placeholder, ...]:
    """The placeholder tokens that the configuration of a base states, each token once."""
    config: Any = getattr(root, "config", None)
    found: dict[int, Placeholder] = {}
    for medium in get_args(Medium):
        for field in (f"{medium}_token_id", f"{medium}_token_index"):
            token = getattr(config, field, None)
            if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
                found.setdefault(token, Placeholder(medium, token, field))
    return tuple(found.values())


def medium_facts(batches: tuple[Any, ...], root: nn.Module) -> Iterator[MediumFacts]:
    """Facts on each medium that a model knows, for each batch of tokens."""
    known = placeholders_of(root)
    types = _RENAMED.get(str(getattr(getattr(root, "config", None), "model_type", "")), _TYPES)
    types = types if known and types in _parameters(root) else ""
    for index, batch in enumerate(batches) if known else ():
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_meta or "inputs_embeds" in batch:
            continue
        media = {placeholder.medium for placeholder in known}
        for placeholder in known:
            yield _facts(index, placeholder, ids, batch, media, types, root)


def _facts(
    index: int,
    placeholder: Placeholder,
    ids: Tensor,
    batch: Mapping[str, Any],
    media: set[Medium],
    types: str,
    root: nn.Module,
) -> MediumFacts:
    medium, token, field = placeholder
    there = ids == token
    labels = batch.get("labels")
    fits = isinstance(labels, Tensor) and labels.shape == ids.shape and not labels.is_meta
    targets = labels[:, 1:] if fits and labels is not None else ids[:, :0]
    grid = f"{medium}_grid_thw"
    given = batch.get(types)
    typed = given if isinstance(given, Tensor) and given.shape == ids.shape else None
    inputs = tuple(_inputs(batch, medium, media))
    return MediumFacts(
        batch=index,
        medium=medium,
        token=token,
        field=field,
        placeholders=int(there.sum()),
        rows=int(there.any(dim=1).sum()),
        inputs=inputs,
        wanted=_wanted(batch.get(grid), root),
        grid=grid,
        targets=int((targets == token).sum()),
        of_targets=int((targets != IGNORED).sum()),
        types=types,
        untyped=None if typed is None else int((there.to(typed.device) & (typed == 0)).sum()),
        flat=bool(inputs) and grid in batch and _are_flat(batch.get("position_ids"), there, root),
        raw=tuple(name for name in inputs if medium != "audio" and _is_raw(batch[name])),
    )


def _are_flat(positions: Any, there: Tensor, root: nn.Module) -> bool:
    """Whether positions are those of a text, for a model whose positions of images have three numbers (M-RoPE)."""
    if not isinstance(positions, Tensor) or positions.is_meta or not _has_grid_positions(root):
        return False
    if positions.ndim != 3:
        return positions.ndim == 2
    if positions.shape[0] not in (3, 4) or positions.shape[1:] != there.shape:
        return False
    time, height, width = positions[-3:]  # a fourth, before them, counts the tokens of a packed text
    several = (there.sum(dim=1, keepdim=True) > 1) & there
    apart = ((time != height) | (height != width)) & several.to(positions.device)
    return bool(several.any()) and not bool(apart.any())


def _has_grid_positions(root: nn.Module) -> bool:
    config: Any = getattr(root, "config", None)
    for one in (config, getattr(config, "text_config", None)):
        for name in ("rope_parameters", "rope_scaling"):
            rotary = getattr(one, name, None)
            if isinstance(rotary, Mapping) and "mrope_section" in rotary:
                return True
    return False


def _is_raw(value: Any) -> bool:
    """Whether an image holds its bytes, which no processor has brought to the range that a tower was trained on."""
    if not isinstance(value, Tensor) or value.is_meta or not value.numel() or value.ndim < 2:
        return False
    if not value.is_floating_point():
        return value.dtype == torch.uint8
    low, high = torch.aminmax(value.detach())
    return bool(low >= 0) and _RAW < float(high) <= 255.0 and bool((value == value.round()).all())


def _inputs(batch: Mapping[str, Any], medium: Medium, media: set[Medium]) -> Iterator[str]:
    words = _INPUTS[medium]
    if medium == "image" and "video" not in media:
        words += "|" + _INPUTS["video"]  # frames then stand where images do
    for name, value in batch.items():
        empty = value is None or (isinstance(value, Tensor) and not value.numel())
        described = name.endswith(("token_type_ids", "_sizes", "grid_thw", "mask"))
        if not empty and not described and re.search(words, str(name)):
            yield str(name)


def _wanted(grid: Any, root: nn.Module) -> int | None:
    """Placeholders for grids of patches (time, height, width), of which squares of ``spatial_merge_size`` are one."""
    vision = getattr(getattr(root, "config", None), "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    if not isinstance(grid, Tensor) or grid.ndim != 2 or grid.is_meta or not isinstance(merge, int):
        return None
    return int(grid.prod(dim=1).sum()) // merge**2


def grids_disagree(batch: Any, root: nn.Module) -> bool:
    """Whether the grids of a batch speak of another number of patches or placeholders than there are."""
    for known in medium_facts((batch,), root):
        grid, patches = (batch.get(name) for name in (known.grid, _PATCHES.get(known.medium)))
        by_rows = isinstance(grid, Tensor) and isinstance(patches, Tensor) and patches.ndim == 2
        if by_rows and int(grid.prod(dim=-1).sum()) != len(patches):
            return True
        if known.wanted is not None and known.wanted != known.placeholders:
            return True
    return False


_PATCHES: dict[Medium, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Inputs with a row for each patch, where a grid says to which image they belong."""


def _parameters(root: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(root.forward).parameters)
