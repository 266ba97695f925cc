"""A batch without values for whatever model transformers builds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.skeleton import META


def batch_for(model: nn.Module, setting: StepSetting) -> dict[str, Any]:
    """The arguments of one training step: inputs, mask and labels of a model's own kind.

    Args:
        model: A transformers model.
        setting: Batch size and sequence length; images and audio have the size of the model's configuration.

    Raises:
        ValueError: The model takes an input that is neither text, images nor audio features.
    """
    transformer: Any = model
    name = _main_input(transformer)
    batch: dict[str, Any] = {name: _inputs(name, transformer.config, setting)}
    if setting.padding_mask and name == "input_ids":
        batch["attention_mask"] = _integers(setting.batch_size, setting.seq_len)
    batch.update(_labels(type(model).__name__, setting))
    return batch


def has_tokens(model: nn.Module) -> bool:
    """Whether sequence length means anything: a transformers model reads tokens, or learns to write them."""
    labels = _labels(type(model).__name__, StepSetting(1, 1)).values()
    return _main_input(model) == "input_ids" or any(tensor.dim() == 2 for tensor in labels)


def _main_input(transformer: Any) -> str:
    name: str = getattr(transformer, "main_input_name", "input_ids")
    return name


def _inputs(name: str, config: Any, setting: StepSetting) -> torch.Tensor:
    size = setting.batch_size
    if name == "input_ids":
        return _integers(size, setting.seq_len)
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        edge = vision.image_size
        height, width = edge if isinstance(edge, (tuple, list)) else (edge, edge)
        dtype = getattr(torch, setting.dtype)
        return torch.empty(size, getattr(vision, "num_channels", 3), height, width, dtype=dtype, device=META)
    if name == "input_features":
        frames = 2 * config.max_source_positions
        return torch.empty(
            size, config.num_mel_bins, frames, dtype=getattr(torch, setting.dtype), device=META
        )
    raise ValueError(
        f"base: its main input is {name!r}; a step can be made of text, images or audio features"
    )


def _labels(architecture: str, setting: StepSetting) -> dict[str, torch.Tensor]:
    size = setting.batch_size
    if architecture.endswith(("ForQuestionAnswering",)):
        return {"start_positions": _integers(size), "end_positions": _integers(size)}
    if architecture.endswith(("ForSequenceClassification", "ForImageClassification")):
        return {"labels": _integers(size)}
    if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        return {}
    return {"labels": _integers(size, setting.seq_len)}


def _integers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.long, device=META)
