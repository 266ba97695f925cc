"""Batches of images and text: faults that rules must name, their remedies, and healthy batches of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
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
from pytest_lora.inspection.training.media import _are_flat, _inputs, _is_raw, medium_facts

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


@pytest.mark.parametrize(
    "said", ["`token_type_ids` is required as a model input", "`mm_token_type_ids` is missing"]
)
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


def grid_positions() -> torch.Tensor:
    """Time, height and width of tokens of which four, from the second on, are an image of two by two."""
    line = torch.arange(16).clone()
    line[5:] -= 2
    time, height, width = line.clone(), line.clone(), line.clone()
    time[1:5], height[1:5], width[1:5] = 1, torch.tensor([1, 1, 2, 2]), torch.tensor([1, 2, 1, 2])
    return torch.stack([time, height, width])[:, None].expand(3, 2, 16).clone()


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
        lambda: changed(grid_batch(), mm_token_type_ids=None, position_ids=grid_positions()),
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


# ---------------------------------------------------------------- positions, names of types, and pixels

GRIDS: Any = SimpleNamespace(
    config=SimpleNamespace(text_config=SimpleNamespace(rope_scaling={"mrope_section": [2]}))
)
LINES: Any = SimpleNamespace(config=SimpleNamespace(rope_parameters={"rope_type": "default"}))
THERE = torch.tensor([[False, True, True, True, True, False]])
LINE = torch.arange(6).expand(1, 6)
GRID = torch.stack([LINE, LINE + torch.tensor([0, 0, 0, 1, 1, 0]), LINE])


@pytest.mark.parametrize(
    ("positions", "root", "there", "flat"),
    [
        (LINE, GRIDS, THERE, True),
        (LINE.expand(3, 1, 6), GRIDS, THERE, True),
        (LINE.expand(4, 1, 6), GRIDS, THERE, True),
        (GRID, GRIDS, THERE, False),
        (torch.cat([LINE[None], GRID]), GRIDS, THERE, False),
        (LINE, LINES, THERE, False),
        (None, GRIDS, THERE, False),
        (LINE.expand(2, 1, 6), GRIDS, THERE, False),
        (LINE.expand(3, 1, 6), GRIDS, THERE & (torch.arange(6) == 2), False),
    ],
    ids=["a line", "a line thrice", "four rows", "a grid", "packed", "no grids", "none", "two", "one patch"],
)
def test_positions_that_put_an_image_into_a_line(
    positions: torch.Tensor | None, root: Any, there: torch.Tensor, flat: bool
) -> None:
    assert _are_flat(positions, there, root) is flat


def test_a_line_of_positions_is_told_and_those_of_the_model_are_not() -> None:
    batch = {**grid_batch(), "position_ids": torch.arange(16).expand(2, 16)}
    assert "LORA377" in {f.code for f in checked("grid_base", batch).findings}
    texts = {**text_alone(), "position_ids": torch.arange(16).expand(2, 16)}
    assert "LORA377" not in {f.code for f in checked("grid_base", texts).findings}, (
        "there is no image to place"
    )


@pytest.mark.parametrize(
    ("pixels", "raw"),
    [
        (torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), True),
        (torch.randint(0, 256, (2, 3, 8, 8)).float(), True),
        (torch.randint(0, 256, (2, 3, 8, 8)) / 255, False),
        (torch.randn(2, 3, 8, 8), False),
        (torch.zeros(2, 3, 8, 8), False),
        (torch.randint(0, 2, (2, 3, 8, 8)).float(), False),
        (torch.randint(-128, 128, (2, 3, 8, 8)).float(), False),
        (torch.rand(2, 3, 8, 8) * 200, False),
        (torch.randint(0, 9000, (2, 3, 8, 8)).float(), False),
        (torch.randint(0, 256, (5,)).float(), False),
        (None, False),
    ],
)
def test_pixels_that_are_bytes(pixels: torch.Tensor | None, raw: bool) -> None:
    assert _is_raw(pixels) is raw


def test_types_of_tokens_are_found_under_the_name_of_the_processor() -> None:
    class Named(nn.Module):
        def __init__(self, model_type: str) -> None:
            super().__init__()
            self.config = SimpleNamespace(model_type=model_type, image_token_id=PLACEHOLDER)

        def forward(self, input_ids: Any, token_type_ids: Any = None) -> None: ...

    batch = {**image_text_batch(), "token_type_ids": torch.zeros(2, 16, dtype=torch.long)}
    (gemma,) = medium_facts((batch,), Named("gemma3"))
    assert (gemma.types, gemma.untyped) == ("token_type_ids", 8)
    (other,) = medium_facts((batch,), Named("paligemma"))
    assert (other.types, other.untyped) == ("", None), "there they part the prompt from the answer"
