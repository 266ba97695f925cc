"""watch_training beside Lightning, whose Trainer runs the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from pytest_lora import LoraHealthWarning, watch_training
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
