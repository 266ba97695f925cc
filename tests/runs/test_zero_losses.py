"""A logged loss of zero that leaves a gradient, as that of a policy gradient does, is no fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_lora import LoraHealthCallback, LoraHealthWarning
from pytest_lora.runs.watch import Watch
from tests.runs.test_watch import trainer


@pytest.mark.filterwarnings("ignore")
def test_zeros_that_leave_a_gradient_are_not_told(tmp_path: Path) -> None:
    def zero(outputs: Any, labels: Any, **_: Any) -> torch.Tensor:
        loss = outputs.logits.logsumexp(-1).mean()
        return loss - loss.detach()

    callback = LoraHealthCallback()
    run = trainer(tmp_path, callback, max_steps=3)
    run.compute_loss_func = zero
    run.train()
    assert [loss["loss"] for loss in run.state.log_history[:3]] == [0, 0, 0]
    told = {finding.code for report in callback.watch.reports for finding in report.findings}
    assert "LORA341" not in told


def test_a_watch_tells_of_zeros() -> None:
    watch = Watch()
    watch.log(0.0)
    with pytest.warns(LoraHealthWarning, match="LORA341"):
        watch.log(0.0)
    silent = Watch()
    silent.zero_has_gradient = True
    for _ in range(5):
        silent.log(0.0)
    assert not silent.reports
