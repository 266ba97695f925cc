"""Batches without values by what a model takes, and how long an estimate may take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.memory import patience
from pytest_lora.inspection.memory.batches import batch_for, has_tokens, image_edges, images_for, reads_images


def model(
    name: str, main: str = "input_ids", takes: str = "input_ids, attention_mask", **config: Any
) -> nn.Module:
    """A model of this class name, main input and arguments."""
    names: dict[str, Any] = {}
    exec(f"def forward(self, {takes}): ...", names)
    made: Any = type(
        name, (nn.Module,), {"forward": names["forward"], "get_input_embeddings": lambda self: None}
    )()
    made.main_input_name, made.config = main, SimpleNamespace(**config)
    return made


def shapes(found: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


STEP = StepSetting(batch_size=2, seq_len=12, padding_mask=True)
TEXT = {"input_ids": (2, 12), "attention_mask": (2, 12)}


@pytest.mark.parametrize(
    ("given", "batch", "tokens"),
    [
        (model("OwnForCausalLM"), {**TEXT, "labels": (2, 12)}, True),
        (model("OwnLMHeadModel"), {**TEXT, "labels": (2, 12)}, True),
        (model("OwnModel"), TEXT, True),
        (model("OwnForSequenceClassification"), {**TEXT, "labels": (2,)}, True),
        (
            model("OwnForSequenceClassification", problem_type="multi_label_classification", num_labels=4),
            {**TEXT, "labels": (2, 4)},
            True,
        ),
        (
            model("OwnForImageClassification", "pixel_values", "pixel_values", image_size=8,
                  problem_type="multi_label_classification", num_labels=4),
            {"pixel_values": (2, 3, 8, 8), "labels": (2, 4)},
            False,
        ),
        (model("OwnForQuestionAnswering"), {**TEXT, "start_positions": (2,), "end_positions": (2,)}, True),
        (
            model("OwnForImageClassification", "pixel_values", "pixel_values", image_size=32, num_channels=1),
            {"pixel_values": (2, 1, 32, 32), "labels": (2,)},
            False,
        ),
        (
            model("OwnForImageClassification", "pixel_values", "pixel_values", image_size=(32, 48)),
            {"pixel_values": (2, 3, 32, 48), "labels": (2,)},
            False,
        ),
        (
            model("OwnForSpeech", "input_features", "input_features", num_mel_bins=80, max_source_positions=15),
            {"input_features": (2, 80, 30), "labels": (2, 12)},
            True,
        ),
        (
            # ((12 - 1) * 2 + 3 - 1) * 5 + 10: what the two convolutions make twelve frames of.
            model("OwnModel", "input_values", "input_values", conv_kernel=[10, 3], conv_stride=[5, 2]),
            {"input_values": (2, 130)},
            True,
        ),
        (
            model("OwnForVision", "pixel_values", "input_ids, attention_mask, pixel_values", image_size=32),
            {**TEXT, "pixel_values": (2, 3, 32, 32), "labels": (2, 12)},
            True,
        ),
    ],
)  # fmt: skip
def test_a_batch_is_of_the_models_kind(given: nn.Module, batch: dict[str, Any], tokens: bool) -> None:
    found = batch_for(given, STEP)
    assert shapes(found) == batch
    assert all(tensor.is_meta for tensor in found.values())
    assert has_tokens(given) is tokens


def test_waveforms_have_the_frames_that_are_asked_for() -> None:
    kernel, stride = [10, 3], [5, 2]
    given = model("OwnModel", "input_values", "input_values", conv_kernel=kernel, conv_stride=stride)
    samples = batch_for(given, STEP)["input_values"]
    layers = [nn.Conv1d(1, 1, k, s, device="meta") for k, s in zip(kernel, stride, strict=True)]
    assert nn.Sequential(*layers)(samples.float()[:, None]).shape[-1] == STEP.seq_len


def test_an_input_that_nothing_is_known_of_is_named() -> None:
    with pytest.raises(ValueError, match="base: its main input is 'molecules'"):
        batch_for(model("OwnModel", "molecules", "molecules"), STEP)


@pytest.mark.parametrize(
    ("asked", "vision", "edges"),
    [
        (None, {}, (448, 448)),
        (None, {"image_size": 32}, (32, 32)),
        (None, {"image_size": [32, 48]}, (32, 48)),
        (64, {"image_size": 32}, (64, 64)),
        ((64, 16), {}, (64, 16)),
    ],
)
def test_edges_of_an_image(asked: Any, vision: dict[str, Any], edges: tuple[int, int]) -> None:
    assert image_edges(SimpleNamespace(**vision), StepSetting(1, 1, image_size=asked)) == edges


def test_images_by_what_a_forward_takes() -> None:
    setting = StepSetting(2, 12, images=3, image_size=(64, 50))
    vision = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    seen = model(
        "OwnForVision", vision_config=SimpleNamespace(num_channels=3, model_type="pixtral", **vision)
    )
    assert reads_images(seen)
    assert not reads_images(model("OwnForCausalLM"))
    assert shapes(images_for(seen, setting, {"pixel_values"})) == {"pixel_values": (6, 3, 64, 50)}
    beside = images_for(seen, setting, {"pixel_attention_mask", "image_sizes", "token_type_ids"})
    assert shapes(beside) == {
        "pixel_values": (2, 3, 3, 64, 50),
        "image_sizes": (6, 2),
        "token_type_ids": (2, 12),
    }
    assert beside["image_sizes"].tolist() == [[64, 50]] * 6
    # Sides of whole merged squares of eight pixels: 16 and 12 patches.
    patches = images_for(seen, setting, {"image_grid_thw", "position_ids"})
    assert patches["image_grid_thw"].tolist() == [[1, 16, 12]] * 6
    assert tuple(patches["pixel_values"].shape) == (6 * 16 * 12, 3 * 2 * 4 * 4)
    assert tuple(patches["position_ids"].shape) == (3, 2, 12)
    small = images_for(seen, StepSetting(1, 12, images=1, image_size=3), {"image_grid_thw"})
    assert small["image_grid_thw"].tolist() == [[1, 2, 2]]


class Clock:
    """Times that a test sets."""

    def __init__(self) -> None:
        self.now = self.worked = 100.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.worked


def test_an_estimate_speaks_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)

    def ticks(count: int = 256) -> str:
        for _ in range(count):
            patience.tick("forward")
        return capsys.readouterr().err

    assert ticks() == ""
    with patience.limited("a step"), patience.limited("another"):
        clock.now += 8.0
        assert ticks() == ""
        clock.now += 0.5
        assert ticks(255) == ""
        assert ticks(1) == "pytest-lora: estimating a step: 8 s, 512 operations so far, now in the forward\n"
        clock.now += 8.0
        assert ticks() == ""
        clock.worked += 50.0
        assert ticks() == ""
        clock.worked += 0.1
        with pytest.raises(
            patience.TooLongError, match="a step takes more than 50 s to trace; given up in the forward"
        ):
            ticks()
    assert ticks() == ""
    with patience.limited("the next"):
        assert ticks() == ""


def test_a_step_of_millions_of_storages_is_not_played() -> None:
    patience.require_few("a step", 3_000_000)
    with pytest.raises(patience.TooLongError, match="a step makes and frees 3,000,001 storages"):
        patience.require_few("a step", 3_000_001)
