"""A sweep that takes milliseconds: a plain base of two linear layers. At the top of a module, so that it pickles."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pytest_lora.sweep import TrialPlan

CONFIG = {"target_modules": ["0", "2"]}


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def make_model_or_wait(folder: str) -> nn.Module:
    """Make a model; where there is a file "pause", wait for ever at the fifth trial."""
    if Path(folder, "pause").exists() and Path(folder, "started").exists() and len(starts(Path(folder))) == 4:
        Path(folder, "waiting").touch()
        time.sleep(600)
    return make_model()


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 8, generator=generator) for _ in range(20)]


def train(model: nn.Module, plan: TrialPlan) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for batch in plan.share(data()) * plan.epochs:
        loss = (model(batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return -(model(data()[0]) - 1).square().mean().item()


def train_and_note(folder: str, model: nn.Module, plan: TrialPlan) -> list[float]:
    """Train, and note each start in a file."""
    with Path(folder, "started").open("a") as file:
        file.write(f"{plan.rank} {plan.seed}\n")
    return train(model, plan)


def train_and_be_killed_once(folder: str, rank: int, model: nn.Module, plan: TrialPlan) -> list[float]:
    """Train; the first process that comes to this rank is killed in the middle of it."""
    losses = train_and_note(folder, model, plan)
    if plan.rank == rank:
        try:
            Path(folder, "killed").touch(exist_ok=False)
        except FileExistsError:
            return losses
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return losses


def train_and_be_killed(folder: str, rank: int, model: nn.Module, plan: TrialPlan) -> list[float]:
    """Train; every process that comes to this rank is killed in the middle of it."""
    losses = train_and_note(folder, model, plan)
    if plan.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return losses


def starts(folder: Path) -> list[str]:
    return sorted((folder / "started").read_text().split("\n")[:-1])


def noting(folder: Path) -> partial[list[float]]:
    return partial(train_and_note, str(folder))
