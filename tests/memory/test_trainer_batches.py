"""Batches of TRL's trainers and what their losses find set up, without TRL: arguments are given by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.memory import trainer_steps, trainers
from pytest_lora.inspection.memory.trainers import (
    TRL,
    _Accelerator,
    defaults_of,
    trainer_arguments,
    trainer_without_data,
)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    given = SimpleNamespace(beta=0.0, num_iterations=1, max_completion_length=None)
    monkeypatch.setattr(trainers, "trainer_arguments", lambda setting: given)
    return given


def shapes(trainer: str, **setting: Any) -> dict[str, tuple[int, ...]]:
    batch = TRL[trainer].batch(StepSetting(6, 10, trainer=trainer, **setting))
    assert all(tensor.is_meta for tensor in batch.values())
    return {name: tuple(tensor.shape) for name, tensor in batch.items()}


def test_sequences_that_a_model_reads_for_one_of_the_batch() -> None:
    assert {name: kind.sequences for name, kind in TRL.items()} == {
        "trl-sft": 1,
        "trl-dpo": 2,
        "trl-kto": 1,
        "trl-reward": 2,
        "trl-grpo": 1,
    }


def test_batches_of_texts_and_pairs(arguments: Any) -> None:
    rows, pairs = (6, 10), (12, 10)
    assert shapes("trl-sft") == {"input_ids": rows, "labels": rows, "attention_mask": rows}
    one = (1, 60)
    assert shapes("trl-sft", padding_free=True) == {"input_ids": one, "labels": one, "position_ids": one}
    assert shapes("trl-reward") == {"input_ids": pairs, "attention_mask": pairs}
    plain = {"input_ids": pairs, "attention_mask": pairs, "completion_mask": pairs}
    assert shapes("trl-dpo") == plain
    arguments.precompute_ref_log_probs = True
    assert shapes("trl-dpo") == {**plain, "ref_chosen_logps": (6,), "ref_rejected_logps": (6,)}


def test_batches_of_single_completions(arguments: Any) -> None:
    rows = (6, 10)
    plain = {"input_ids": rows, "attention_mask": rows, "completion_mask": rows, "label": (6,)}
    mismatched = {f"KL_{name}": rows for name in ("input_ids", "attention_mask", "completion_mask")}
    assert shapes("trl-kto") == plain | mismatched
    arguments.loss_type = "apo_zero_unpaired"
    assert shapes("trl-kto") == plain
    arguments.precompute_ref_log_probs = True
    assert shapes("trl-kto") == {**plain, "ref_logps": (6,), "ref_KL_logps": (6,)}


def test_batches_of_generated_completions(arguments: Any) -> None:
    def parts(prompt: int, completion: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {f"prompt_{name}": (6, prompt) for name in ("ids", "mask")}
        found |= {f"completion_{name}": (6, completion) for name in ("ids", "mask")}
        return found | {"advantages": (6,), "num_items_in_batch": ()}

    assert shapes("trl-grpo") == parts(1, 9)
    arguments.max_completion_length = 4
    assert shapes("trl-grpo") == parts(6, 4)
    arguments.max_completion_length = 256
    assert shapes("trl-grpo") == parts(1, 9)
    arguments.beta, arguments.num_iterations = 0.1, 2
    more = {"ref_per_token_logps": (6, 9), "old_per_token_logps": (6, 9)}
    assert shapes("trl-grpo") == parts(1, 9) | more
    arguments.use_vllm = True
    assert shapes("trl-grpo") == parts(1, 9) | more
    arguments.vllm_importance_sampling_correction = True
    assert shapes("trl-grpo") == parts(1, 9) | more | {"importance_sampling_ratio": (6, 9)}
    arguments.vllm_importance_sampling_mode = "sequence_mask"
    assert shapes("trl-grpo") == parts(1, 9) | more | {"importance_sampling_ratio": (6, 1)}
    arguments.use_vllm = False
    assert shapes("trl-grpo") == parts(1, 9) | more


@dataclass
class Declared:
    needed: int
    given: int = 3
    made: list[int] = field(default_factory=lambda: [4])
    steps_per_generation: int | None = None


def test_arguments_are_the_defaults_and_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert defaults_of(Declared) == {"given": 3, "made": [4], "steps_per_generation": None}
    monkeypatch.setattr(trainers, "class_of_trl", lambda name: Declared)
    asked = StepSetting(1, 1, trainer="trl-sft", accumulation=5, args=(("given", 7),))
    found = trainer_arguments(asked)
    assert (found.given, found.made, found.steps_per_generation) == (7, [4], 5)
    stated = StepSetting(1, 1, trainer="trl-sft", accumulation=5, args=(("steps_per_generation", 2),))
    assert trainer_arguments(stated).steps_per_generation == 2
    monkeypatch.setattr(Declared, "__dataclass_fields__", {"given": Declared.__dataclass_fields__["given"]})
    assert not hasattr(trainer_arguments(asked), "steps_per_generation")


def made(trainer: str = "trl-dpo", **arguments: Any) -> Any:
    return trainer_without_data(
        Plain,
        nn.Module(),
        SimpleNamespace(**arguments),
        StepSetting(1, 1, trainer=trainer, accumulation=3),
    )


class Plain:
    pass


def test_what_a_loss_finds_set_up() -> None:
    plain = made()
    assert (plain.loss_types, plain.loss_weights, plain.epsilon_high) == (None, [], None)
    assert (plain._total_train_tokens, plain._tp_size, plain.router_aux_loss_coef) == (0, 1, 0.0)
    assert plain.current_gradient_accumulation_steps == 3
    assert plain._entropy_bonus_enabled is False
    assert made(entropy_coef=0.1)._entropy_bonus_enabled is True
    assert made(loss_type="sigmoid").loss_types == ["sigmoid"]
    assert made(loss_type="sigmoid").loss_weights == [1.0]
    assert made(loss_type=["a", "b"], loss_weights=[2.0, 3.0]).loss_weights == [2.0, 3.0]
    assert made(loss_type=("a", "b")).loss_types == ["a", "b"]
    assert made(loss_type=["a", "b"]).loss_weights == [1.0, 1.0]
    assert made("trl-kto", loss_type="kto").loss_types == "kto"
    assert (made(epsilon=0.2).epsilon_low, made(epsilon=0.2).epsilon_high) == (0.2, 0.2)
    assert made(epsilon=0.2, epsilon_high=0.3).epsilon_high == 0.3
    one = _Accelerator()
    assert (one.num_processes, one.is_main_process, one.sync_gradients) == (1, True, True)
    assert one.gather(torch.empty(3, device="meta")).tolist() == [0.0] * 3
    assert trainer_steps._OF_ONE_GPU["n_gpu"] == trainer_steps._OF_ONE_GPU["world_size"] == 1


@pytest.mark.parametrize(
    ("trainer", "arguments", "done"),
    [
        ("trl-sft", {}, [{"outputs": ("log_probs", "entropy", "is_top1")}]),
        (
            "trl-dpo",
            {"use_weighting": True},
            [{"outputs": ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")}],
        ),
        (
            "trl-grpo",
            {"temperature": 0.5, "cast_lm_head_to_fp32": False},
            [{"outputs": ("log_probs", "entropy"), "temperature": 0.5, "cast_lm_head_to_fp32": False}],
        ),
        ("trl-reward", {}, []),
        ("trl-reward", {"disable_dropout": True}, ["no dropout"]),
    ],
)
def test_what_a_trainer_does_to_a_model(
    monkeypatch: pytest.MonkeyPatch, trainer: str, arguments: dict[str, Any], done: list[Any]
) -> None:
    seen: list[Any] = []
    utilities = SimpleNamespace(
        disable_dropout_in_model=lambda model: seen.append("no dropout"),
        add_fused_lm_head=lambda model, **how: seen.append(how),
    )
    monkeypatch.setattr(trainers, "trainer_arguments", lambda setting: SimpleNamespace(**arguments))
    monkeypatch.setattr(trainers, "_utilities", lambda: utilities)
    setting = StepSetting(1, 1, trainer=trainer)
    trainers.set_up(nn.Module(), nn.Module(), setting)
    assert seen == done
    del utilities.add_fused_lm_head, seen[:]
    trainers.set_up(nn.Module(), nn.Module(), setting)
    assert seen == [one for one in done if one == "no dropout"]


@pytest.mark.parametrize(
    ("keeps", "only_loss", "width"), [("loss", True, 5), ("logits", False, 5), ("predictions", False, None)]
)
def test_what_an_evaluation_keeps(
    monkeypatch: pytest.MonkeyPatch, arguments: Any, keeps: str, only_loss: bool, width: int | None
) -> None:
    pytest.importorskip("transformers")
    asked: list[bool] = []

    class Trainer:
        def prediction_step(self, model: Any, batch: Any, prediction_loss_only: bool) -> Any:
            asked.append(prediction_loss_only)
            return None, (torch.ones(2, 3, 5), 7), None

    monkeypatch.setattr(trainer_steps, "class_of_trl", lambda name: Trainer)
    setting = StepSetting(1, 2, trainer="trl-sft")
    _, logits, _ = trainer_steps.prediction_step(nn.Module(), nn.Linear(1, 1), setting, None, keeps)
    assert asked == [only_loss]
    if width is None:
        assert logits.shape == (2, 3)
    else:
        assert logits[0].shape == (2, 3, 5)
