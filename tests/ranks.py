"""What the ranks of test_distributed.py do."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pytest_lora import assert_adapters_in_sync


def second_raises() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("only the second")
    dist.barrier()


def second_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def second_never_comes() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def adapter(seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return get_peft_model(network, LoraConfig(r=2, target_modules=["0", "2"]))


def step(model: Any, *, synchronized: bool = True) -> None:
    """A step on data that differs between the ranks."""
    torch.manual_seed(dist.get_rank())
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        if synchronized or not hasattr(model, "no_sync"):
            model(torch.randn(4, 8, device=device)).pow(2).sum().backward()
        else:
            with model.no_sync():
                model(torch.randn(4, 8, device=device)).pow(2).sum().backward()
        optimizer.step()


def data_parallel(synchronized: bool) -> None:
    model = nn.parallel.DistributedDataParallel(adapter())
    step(model, synchronized=synchronized)
    assert_adapters_in_sync(model)


def wrapped_in_nothing() -> None:
    assert_adapters_in_sync(adapter(seed=dist.get_rank()))


def unlike_shapes() -> None:
    model = adapter()
    if dist.get_rank() == 1:
        model.base_model.model[0].lora_B["default"].weight = nn.Parameter(torch.zeros(8, 3))
        model.base_model.model[2].lora_B["default"].weight = None
    assert_adapters_in_sync(model)


def sharded(second_version: bool) -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    device = "cpu" if second_version else "cuda"
    model = adapter().to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    if second_version:
        fully_shard(model, mesh=mesh)
    else:
        model = FullyShardedDataParallel(model, device_mesh=mesh, use_orig_params=True)
    step(model)
    assert_adapters_in_sync(model)
    return True


def left_out_of_the_shards() -> None:
    """The one weight that FSDP does not take is trained on each rank for itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapter()
    ignored = {model.base_model.model[0].lora_B["default"].weight}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)
    step(model)
    assert_adapters_in_sync(model)


def no_adapter() -> None:
    assert_adapters_in_sync(nn.Linear(2, 2).requires_grad_(False))


def who(prefix: str) -> str:
    total = torch.ones(())
    dist.all_reduce(total)
    return f"{prefix} {dist.get_rank()} of {int(total)}"


def every_verdict() -> dict[str, str]:
    """What each of these models is told, one after the other: starting processes takes longer than all of them."""
    scenes = {
        "in sync": lambda: data_parallel(True),
        "drifting": lambda: data_parallel(False),
        "late seed": wrapped_in_nothing,
        "unlike shapes": unlike_shapes,
        "sharded": lambda: sharded(True),
        "left out": left_out_of_the_shards,
        "no adapter": no_adapter,
    }
    told = {}
    for name, scene in scenes.items():
        try:
            scene()
            told[name] = ""
        except (AssertionError, TypeError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def own_device() -> str:
    return str(torch.ones(1, device="cuda").device)
