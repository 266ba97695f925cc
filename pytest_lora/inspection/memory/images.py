"""Images without values for models that read text and images."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.skeleton import META

DEFAULT_EDGE = 448
"""Pixels of an image's edge where the configuration names none: models of any resolution."""


def reads_images(model: nn.Module) -> bool:
    """Whether a model reads images beside text."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "vision_config", None) is not None and hasattr(model, "get_input_embeddings")


def image_edges(vision: Any, setting: StepSetting) -> tuple[int, int]:
    """Height and width of an image in pixels: as asked, as the model has it, or ``DEFAULT_EDGE``."""
    edge = setting.image_size or getattr(vision, "image_size", None) or DEFAULT_EDGE
    height, width = edge if isinstance(edge, (tuple, list)) else (edge, edge)
    return int(height), int(width)


def images_for(model: Any, setting: StepSetting, takes: Container[str]) -> dict[str, Any]:
    """The arguments that carry the images of a batch, by the names that a model's forward takes.

    Args:
        model: A transformers model with a vision tower.
        setting: Batch size, images in each sequence, and their size.
        takes: Names of the arguments of its forward.
    """
    vision = model.config.vision_config
    count = setting.batch_size * setting.images
    height, width = image_edges(vision, setting)
    if "image_grid_thw" in takes:
        return _patches(model, setting, vision, count, takes)
    channels = getattr(vision, "num_channels", 3)
    pixels = torch.empty(count, channels, height, width, dtype=getattr(torch, setting.dtype), device=META)
    batch: dict[str, Any] = {"pixel_values": pixels}
    if "pixel_attention_mask" in takes:  # Idefics: images of a sequence side by side
        batch["pixel_values"] = pixels.view(setting.batch_size, setting.images, channels, height, width)
    if "image_sizes" in takes and getattr(vision, "model_type", "") == "pixtral":
        batch["image_sizes"] = torch.tensor([[height, width]] * count)
    if "token_type_ids" in takes:
        shape = setting.batch_size, setting.seq_len
        batch["token_type_ids"] = torch.empty(shape, dtype=torch.long, device=META)
    return batch


def _patches(
    model: Any, setting: StepSetting, vision: Any, count: int, takes: Container[str]
) -> dict[str, Any]:
    """Patches in a row and the grid that they came from, which decides shapes and so has values (Qwen's family)."""
    merged = vision.patch_size * vision.spatial_merge_size
    sides = [max(1, edge // merged) * vision.spatial_merge_size for edge in image_edges(vision, setting)]
    numbers = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.empty(
        count * sides[0] * sides[1], numbers, dtype=getattr(torch, setting.dtype), device=META
    )
    batch: dict[str, Any] = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, *sides]] * count)}
    if "position_ids" in takes:
        shape = 3, setting.batch_size, setting.seq_len
        batch["position_ids"] = torch.empty(shape, dtype=torch.long, device=META)
    return batch
