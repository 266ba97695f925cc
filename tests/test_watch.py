"""LoraHealthCallback in real Trainer runs on the built-in base, and watch_training in a loop of one's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from pytest_lora import LoraHealthCallback, LoraHealthError, LoraHealthWarning, watch_training
from pytest_lora.tiny import load_tiny, sample_texts, text_batch
from pytest_lora.watch import Watch

ROWS = [
    {name: tensor[0] for name, tensor in text_batch([text], batch_size=1, seq_len=48).items()}
    for text in sample_texts(32)
]


def adapted() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_tiny(), config)


def trainer(folder: Path, callback: LoraHealthCallback, model: Any = None, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return Trainer(
        model=model or adapted(),
        args=TrainingArguments(**arguments),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        callbacks=[callback],
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", LoraHealthWarning)
        yield


def test_a_healthy_run_passes_in_silence(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="raise")
    trainer(tmp_path, callback, eval_strategy="steps", eval_steps=4).train()
    assert callback.watch.count == 12
    assert callback.watch.total_steps == 12
    assert callback.watch.learning_rate == 2e-3
    assert not any(report.errors or report.warnings for report in callback.watch.reports)


def poisoned() -> torch.nn.Module:
    """NaN in the adapter, which the Trainer logs as a loss of 0."""
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    return model


@pytest.mark.parametrize("filtered", [True, False])
def test_a_run_that_is_nan_raises(tmp_path: Path, filtered: bool) -> None:
    run = trainer(tmp_path, LoraHealthCallback(on_error="raise"), poisoned(), logging_nan_inf_filter=filtered)
    with pytest.raises(LoraHealthError, match="LORA341" if filtered else "LORA340"):
        run.train()
    assert run.state.global_step <= 2


def test_a_run_that_is_nan_stops(tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="stop")
    run = trainer(tmp_path, callback, poisoned(), logging_nan_inf_filter=False)
    with pytest.warns(LoraHealthWarning, match="LORA340"):
        run.train()
    assert run.state.global_step == 1
    assert callback.watch.should_stop


def test_a_run_that_is_nan_is_told_once_and_goes_on(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, LoraHealthCallback(), poisoned(), logging_nan_inf_filter=False, max_steps=5, logging_steps=2
    )
    with pytest.warns(LoraHealthWarning) as told:
        run.train()
    assert sum("LORA340" in str(one.message) for one in told) == 1
    assert run.state.global_step == 5


def test_a_merged_adapter_is_told_before_the_first_step(tmp_path: Path) -> None:
    model: Any = adapted()
    model.merge_adapter()
    run = trainer(tmp_path, LoraHealthCallback(on_error="raise"), model)
    with pytest.raises(LoraHealthError, match="LORA203"):
        run.train()
    assert run.state.global_step == 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="on_error must be one of"):
        LoraHealthCallback(on_error="ignore")
    with pytest.raises(ValueError, match="model_steps"):
        LoraHealthCallback(model_steps=0)


def loop(steps: int = 6) -> tuple[torch.nn.Module, torch.optim.Optimizer, Iterator[torch.Tensor]]:
    model = adapted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    def losses() -> Iterator[torch.Tensor]:
        for _ in range(steps):
            loss = model(**text_batch(seq_len=48)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    return model, optimizer, losses()


def test_a_healthy_loop_passes_in_silence() -> None:
    model, optimizer, losses = loop()
    with watch_training(model, optimizer, total_steps=100, on_error="raise") as watch:
        for loss in losses:
            watch.log(loss, eval_loss=loss)
    assert watch.count == 6
    assert watch.learning_rate == 2e-3
    assert not watch.should_stop


def fed(on_error: str, losses: Iterable[float]) -> Watch:
    """A loop that logs these losses, and ends itself when it is told to."""
    model, optimizer, _ = loop()
    with watch_training(model, optimizer, on_error=on_error) as watch:
        for loss in losses:
            watch.log(loss)
            if watch.should_stop:
                break
    return watch


def test_a_loop_can_stop_itself() -> None:
    with pytest.warns(LoraHealthWarning, match="LORA340"):
        watch = fed("stop", [2.0, 1.9, math.nan, math.nan])
    assert watch.count == 3


def test_a_loop_is_judged_at_its_end() -> None:
    with pytest.raises(LoraHealthError, match=r"from 0\.002 to 0\.0002"):
        fed("raise", [1.0, 1.5, 2.5, 4.0, 6.0, 6.5, 6.4, 6.6])


def test_an_error_of_the_loop_itself_is_not_covered_up() -> None:
    with pytest.raises(ZeroDivisionError):
        fed("raise", (1 / n for n in (1, 0)))
