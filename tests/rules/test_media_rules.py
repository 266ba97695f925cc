"""Batches of images and text: faults that rules must name, their remedies, and healthy batches of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
)

from pytest_lora import Report, check_training
from pytest_lora.bases.examples.models import (
    BASES,
    PLACEHOLDER,
    TAKES_TOKEN_TYPES,
    VOCABULARY,
    WIDTH,
    grid_batch,
    image_text_batch,
    language_batch,
)
from pytest_lora.inspection.training.failures import failure_of
from pytest_lora.inspection.training.media import _inputs

pytestmark = pytest.mark.filterwarnings("ignore")

Batch = dict[str, torch.Tensor]
LANGUAGE = r".*language_model.*(q_proj|v_proj)"


def adapted(base: str | nn.Module) -> Any:
    model = BASES[base]() if isinstance(base, str) else base
    return get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE)).train()


def checked(base: str | nn.Module, batches: Any, **how: Any) -> Report:
    return check_training(adapted(base), batches, **how)


def text_alone(rows: int = 2) -> Batch:
    batch = language_batch(rows)
    batch["input_ids"] += 10 * (batch["input_ids"] < 10)
    return {**batch, "labels": batch["input_ids"].clone()}


def changed(batch: Batch, **changes: torch.Tensor | None) -> Batch:
    return {k: v for k, v in {**batch, **changes}.items() if v is not None}


def audio_base() -> nn.Module:
    encoder = Qwen2AudioEncoderConfig(
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=16,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    config = Qwen2AudioConfig(audio_config=encoder, text_config=text, audio_token_index=PLACEHOLDER)
    return Qwen2AudioForConditionalGeneration(config)


def placeholders_not_expanded() -> Batch:
    """One token an image, as a tokenizer gives it, in place of the processor's four."""
    batch = image_text_batch()
    batch["input_ids"][:, 2:5] = 50
    return batch


FAULTS: dict[str, tuple[str, Callable[[], Batch], str, str]] = {
    "tokens without pixels": (
        "image_text_base",
        lambda: changed(image_text_batch(), pixel_values=None),
        "LORA361",
        "8 image placeholders (image_token_id=5) in 2 rows, and no pixel_values",
    ),
    "no pixels where grids were left": (
        "grid_base",
        lambda: changed(grid_batch(), pixel_values=None, image_grid_thw=None),
        "LORA361",
        "no pixel_values",
    ),
    "pixels without tokens": (
        "image_text_base",
        lambda: {**text_alone(), "pixel_values": torch.randn(2, 3, 16, 16)},
        "LORA319",
        "as many placeholder tokens in input_ids",
    ),
    "fewer images than placeholders": (
        "image_text_base",
        lambda: changed(image_text_batch(), pixel_values=torch.randn(1, 3, 16, 16)),
        "LORA319",
        "processor",
    ),
    "placeholders not expanded": ("image_text_base", placeholders_not_expanded, "LORA319", "processor"),
    "patches of another grid": (
        "grid_base",
        lambda: changed(grid_batch(), pixel_values=torch.randn(16, 96)),
        "LORA319",
        "processor",
    ),
    "grid of another image": (
        "grid_base",
        lambda: changed(grid_batch(), image_grid_thw=torch.tensor([[1, 4, 4], [1, 2, 4]])),
        "LORA319",
        "processor",
    ),
}

needs_token_types = pytest.mark.skipif(not TAKES_TOKEN_TYPES, reason="the model takes no mm_token_type_ids")


@pytest.mark.parametrize("name", FAULTS)
def test_what_came_with_the_placeholders_is_compared(name: str) -> None:
    base, batch, code, words = FAULTS[name]
    report = checked(base, batch())
    assert [f.code for f in report.findings] == [code], str(report)
    assert words in str(report)


@pytest.mark.parametrize("said", ["`token_type_ids` is required as a model input", "`mm_token_type_ids` is missing"])
def test_token_types_that_a_model_asks_for_are_known_by_its_words(said: str) -> None:
    failure = failure_of(
        ValueError(said), "forward pass", BASES["image_text_base"](), image_text_batch(), step=1, index=0
    )
    assert failure is not None
    assert failure.kind == "token types"


def test_pixels_that_no_token_sees_are_a_warning() -> None:
    """Where the model itself does not complain."""
    base = BASES["image_text_base"]()
    forward = base.forward
    base.forward = lambda pixel_values=None, **rest: forward(**rest)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=LANGUAGE)).train()
    batch = {**text_alone(), "pixel_values": torch.randn(2, 3, 16, 16)}
    (finding,) = check_training(model, batch).findings
    assert (finding.code, finding.severity) == ("LORA361", "warning")
    assert "pixel_values but no image placeholders" in finding.observed


def test_audio_is_known_by_its_own_token_and_input() -> None:
    batch = changed(image_text_batch(), pixel_values=None)
    (finding,) = checked(audio_base(), batch).findings
    assert finding.code == "LORA361"
    assert "8 audio placeholders (audio_token_i" in finding.observed


def test_placeholders_among_the_targets_are_counted_and_the_remedy_mends() -> None:
    batch = image_text_batch()
    batch["labels"] = batch["input_ids"].clone()
    (finding,) = checked("image_text_base", batch).findings
    assert finding.code == "LORA362"
    assert "8 of 30 targets are image placeholders" in finding.observed
    batch["labels"][batch["input_ids"] == PLACEHOLDER] = -100
    assert not checked("image_text_base", batch).findings


@needs_token_types
def test_token_types_that_are_shifted_are_told() -> None:
    batch = grid_batch()
    batch["mm_token_type_ids"] = batch["mm_token_type_ids"].roll(1, dims=1)
    report = checked("grid_base", batch)
    assert "LORA363" in {f.code for f in report.findings}
    assert "are 0 (text) at 2 of 8 image placeholders" in str(report)


HEALTHY: dict[str, tuple[str, Callable[[], Any]]] = {
    "images and text": ("image_text_base", image_text_batch),
    "images told by grids": ("grid_base", grid_batch),
    "text alone": ("image_text_base", text_alone),
    "a batch with images and one without": ("image_text_base", lambda: [image_text_batch(), text_alone()]),
    "no image in this batch": (
        "image_text_base",
        lambda: {**text_alone(), "pixel_values": None},
    ),
    "positions of one's own in place of token types": (
        "grid_base",
        lambda: changed(
            grid_batch(), mm_token_type_ids=None, position_ids=torch.arange(16).expand(3, 2, 16).clone()
        ),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_batches_are_left_alone(name: str) -> None:
    base, batches = HEALTHY[name]
    report = checked(base, batches())
    assert not report.findings, str(report)


def test_a_loss_of_ones_own_may_put_the_media_elsewhere() -> None:
    batch = changed(image_text_batch(), pixel_values=None)
    batch["labels"] = batch["input_ids"].clone()
    report = checked("image_text_base", batch, loss_fn=lambda model, given: model(**given).loss)
    assert not report.findings, str(report)


@pytest.mark.parametrize(
    ("medium", "media", "found"),
    [
        ("image", {"image"}, ["pixel_values", "pixel_values_videos"]),
        ("image", {"image", "video"}, ["pixel_values"]),
        ("audio", {"audio"}, ["input_features"]),
        ("video", {"video"}, ["pixel_values", "pixel_values_videos"]),
    ],
)
def test_frames_stand_for_images_only_where_the_model_has_no_videos(
    medium: Any, media: Any, found: list[str]
) -> None:
    batch = dict.fromkeys(
        ("pixel_values", "pixel_values_videos", "input_features", "image_sizes"), torch.ones(1)
    )
    assert list(_inputs(batch, medium, media)) == found
