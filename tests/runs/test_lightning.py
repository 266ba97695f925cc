"""watch_training beside Lightning, whose Trainer runs the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from pytest_lora import LoraHealthCallback, LoraHealthError, LoraHealthWarning, watch_training
from pytest_lora.runs.watch import Watch
from tests.runs.test_watch import ROWS, small

STEPS = 6


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        small(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def trained(model: Any, optimizer: Any, watch: Watch, folder: Path) -> None:
    """Let Lightning's Trainer take some steps of a module that logs its losses to the watch."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Any], index: int) -> Any:
            return self.model(**batch).loss

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            watch.log(outputs["loss"])

        def configure_optimizers(self) -> Any:
            return optimizer

    runner = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    runner.fit(Module(), DataLoader(ROWS, batch_size=4))


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)


def test_a_healthy_run_passes_in_silence(tmp_path: Path) -> None:
    model = adapted()
    optimizer = adam(model)
    with watch_training(model, optimizer, total_steps=STEPS, on_error="raise") as watch:
        trained(model, optimizer, watch, tmp_path)
    assert watch.count == STEPS
    assert not [f for report in watch.reports for f in (*report.errors, *report.warnings)]


def test_frozen_adapters_are_told(tmp_path: Path) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    optimizer = adam(model)
    with (
        pytest.warns(LoraHealthWarning) as told,
        watch_training(model, optimizer, total_steps=STEPS) as watch,
    ):
        trained(model, optimizer, watch, tmp_path)
    codes = {finding.code for report in watch.reports for finding in report.errors}
    assert {"LORA224", "LORA313"} <= codes
    assert any("LORA313" in str(warning.message) for warning in told)


# ------------------------------------------------------------------------------------------------- the callback


def module(model: Any, rate: float = 2e-3, *, validates: bool = False) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Any], index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=rate)

    if validates:

        def validation_step(self: Any, batch: dict[str, Any], index: int) -> None:
            self.log("val_loss", self.model(**batch).loss)

        Module.validation_step = validation_step
    return Module()


def fit(model: Any, callback: Any, folder: Path, *, validation: bool = False, **changes: Any) -> Any:
    """Train with the callback, and give Lightning's Trainer back."""
    lightning = pytest.importorskip("lightning")
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **changes,
    }
    runner = lightning.Trainer(callbacks=[callback], **settings)
    rows = DataLoader(ROWS, batch_size=4)
    runner.fit(module(model, validates=validation), rows, *([rows] if validation else []))
    return runner


def callback(**arguments: Any) -> Any:
    pytest.importorskip("lightning")
    from pytest_lora.runs.lightning import LoraHealthLightning

    return LoraHealthLightning(**arguments)


def test_the_callback_watches_a_healthy_run_in_silence(tmp_path: Path) -> None:
    watching = callback(on_error="raise")
    runner = fit(adapted(), watching, tmp_path, validation=True, max_epochs=2, accumulate_grad_batches=2)
    assert watching.watch.count == runner.global_step
    assert watching.watch.total_steps == runner.estimated_stepping_batches
    assert not [f for report in watching.watch.reports for f in (*report.errors, *report.warnings)]
    assert watching.watch._evals
    (optimizer,) = runner.optimizers
    assert not optimizer._optimizer_step_pre_hooks


def test_the_callback_tells_of_frozen_adapters_and_stops(tmp_path: Path) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    watching = callback(on_error="stop")
    with pytest.warns(LoraHealthWarning, match="LORA224"):
        runner = fit(model, watching, tmp_path)
    assert runner.global_step < STEPS
    watching = callback()
    with pytest.warns(LoraHealthWarning):
        fit(model, watching, tmp_path)
    codes = {finding.code for report in watching.watch.reports for finding in report.errors}
    assert {"LORA224", "LORA313"} <= codes


def test_the_callback_lets_go_where_a_run_fails_and_names_a_model_without_lora(tmp_path: Path) -> None:
    model = adapted()
    watching = callback(on_error="raise")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    with pytest.raises(LoraHealthError, match="LORA224"):
        fit(model, watching, tmp_path)
    assert watching.watch._first_steps is None
    with pytest.warns(LoraHealthWarning, match="carries no LoRA layers"):
        fit(small(), callback(), tmp_path)


def test_codes_are_checked_as_those_of_the_trainers_callback() -> None:
    pytest.importorskip("lightning")
    from pytest_lora.runs.lightning import LoraHealthLightning

    wrong: Any
    for wrong in ("LORA3", 3):
        said = []
        for callback in (LoraHealthLightning, LoraHealthCallback):
            with pytest.raises(TypeError, match="ignore") as raised:
                callback(ignore=wrong)
            said.append(str(raised.value))
        assert said[0] == said[1]
