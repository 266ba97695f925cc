"""Functions for several ranks, for ``run_distributed``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._C._distributed_c10d import HashStore

R = TypeVar("R")


def step_in_ddp(check: Callable[[nn.Module], R]) -> R:
    """Take a step on data that differs between the ranks, with gradients averaged, and check the model."""
    return check(_stepped(nn.parallel.DistributedDataParallel(_adapted())))


def step_without_synchronisation(check: Callable[[nn.Module], R]) -> R:
    """Take a step on data that differs between the ranks, each for itself, and check the model."""
    return check(_stepped(_adapted()))


def in_one_process(wrapper: Callable[..., R], model: nn.Module, **settings: Any) -> R:
    """Wrap a model as a run on several GPUs does, in a process group of this process alone where there is none."""
    if dist.is_initialized():
        return wrapper(model, **settings)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        return wrapper(model, **settings)
    finally:
        dist.destroy_process_group()


def _adapted() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    adapted: nn.Module = get_peft_model(network, LoraConfig(r=2, target_modules=["0", "2"]))
    return adapted


def _stepped(model: nn.Module) -> nn.Module:
    torch.manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).pow(2).sum().backward()
        optimizer.step()
    return model
