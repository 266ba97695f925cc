"""A batch without values for whatever model transformers builds, with images where the model reads them."""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.skeleton import META
from pytest_lora.inspection.transformers_internals import (
    masks_where_nothing_is_masked,
    runs_images_without_values,
)

DEFAULT_EDGE = 448
"""Pixels of an image's edge where the configuration names none: models of any resolution."""


def batch_for(model: nn.Module, setting: StepSetting) -> dict[str, Any]:
    """The arguments of one training step: inputs, mask and labels of a model's own kind.

    Args:
        model: A transformers model.
        setting: Batch size, sequence length and images; audio has the length of the model's configuration, or for
            waveforms that of ``seq_len`` frames.

    Raises:
        ValueError: The model takes an input that is neither text, images nor audio.
    """
    transformer: Any = model
    name = _main_input(transformer)
    takes = inspect.signature(type(model).forward).parameters
    batch: dict[str, Any] = {}
    if setting.padding_free and name == "input_ids":
        return _in_one_row(setting, takes)
    if name == "input_ids" or ("input_ids" in takes and "pixel_values" in takes):
        batch["input_ids"] = _integers(setting.batch_size, setting.seq_len)
    if name != "input_ids":
        batch[name] = _inputs(name, transformer.config, setting)
    elif "pixel_values" in takes and reads_images(model) and setting.images and runs_images_without_values():
        batch.update(images_for(transformer, setting, takes))
    of_ones = "attention_mask" in takes and masks_where_nothing_is_masked()
    if (setting.padding_mask or of_ones) and "input_ids" in batch:
        batch["attention_mask"] = _integers(setting.batch_size, setting.seq_len)
    batch.update(_labels(transformer, setting))
    return batch


def _in_one_row(setting: StepSetting, takes: Any) -> dict[str, Any]:
    """All sequences one after the other, as ``DataCollatorWithFlattening`` gives them."""
    shape = 1, setting.batch_size * setting.seq_len
    names = [name for name in ("input_ids", "labels", "position_ids") if name in takes]
    return {name: _integers(*shape) for name in names}


def has_tokens(model: nn.Module) -> bool:
    """Whether sequence length means anything: a transformers model reads tokens, or learns to write them."""
    labels = _labels(model, StepSetting(1, 1)).values()
    name = _main_input(model)
    written = any(tensor.dim() == 2 and not tensor.is_floating_point() for tensor in labels)
    return name in ("input_ids", "input_values") or written


def _main_input(transformer: Any) -> str:
    name: str = getattr(transformer, "main_input_name", "input_ids")
    return name


def _inputs(name: str, config: Any, setting: StepSetting) -> torch.Tensor:
    size = setting.batch_size
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        height, width = image_edges(vision, setting)
        return _numbers(setting, size, getattr(vision, "num_channels", 3), height, width)
    if name == "input_features":
        return _numbers(setting, size, config.num_mel_bins, 2 * config.max_source_positions)
    if name == "input_values" and hasattr(config, "conv_kernel"):
        return _numbers(setting, size, _samples(config, setting.seq_len))
    raise ValueError(
        f"base: its main input is {name!r}; a step can be made of text, images, waveforms or audio features"
    )


def _samples(config: Any, frames: int) -> int:
    """The samples of a waveform that the convolutions of an encoder make so many frames of."""
    length = frames
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        length = (length - 1) * stride + kernel
    return length


def _numbers(setting: StepSetting, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=getattr(torch, setting.dtype), device=META)


def _labels(model: Any, setting: StepSetting) -> dict[str, torch.Tensor]:
    architecture, size = type(model).__name__, setting.batch_size
    if architecture.endswith(("ForQuestionAnswering",)):
        return {"start_positions": _integers(size), "end_positions": _integers(size)}
    if architecture.endswith(("ForSequenceClassification", "ForImageClassification")):
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            return {"labels": torch.empty(size, model.config.num_labels, device=META)}
        return {"labels": _integers(size)}
    if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        return {}
    return {"labels": _integers(size, setting.seq_len)}


def _integers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.long, device=META)


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
        return _patches(setting, vision, count, takes)
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


def _patches(setting: StepSetting, vision: Any, count: int, takes: Container[str]) -> dict[str, Any]:
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
