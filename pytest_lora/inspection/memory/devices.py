"""What decides a step's memory and differs from GPU to GPU: asked of the device where there is one."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from pytest_lora.facts.memory import AMPERE_WORKSPACE
from pytest_lora.facts.memory_choices import ATTENTION_KERNELS, Attention

HOPPER_WORKSPACE = 32 * 2**20
_ON_INSTINCT = 128 * 2**20
"""Of gfx94x and gfx95x; other GPUs of AMD take as much as Hopper (aten/src/ATen/cuda/CublasHandlePool.cpp)."""


class DeviceAnswers(NamedTuple):
    """What a device says of itself.

    Attributes:
        workspace: Bytes of one workspace of cuBLAS.
        attention: Kernel of scaled dot product attention without a mask.
    """

    workspace: int
    attention: Attention


ASSUMED = DeviceAnswers(AMPERE_WORKSPACE, "flash")
"""Where there is no device to ask: Ampere and Ada, the cards that most budgets are for."""


def of_model(model: object) -> DeviceAnswers:
    """The answers of the CUDA device that a model lies on; what is assumed for anything else."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return ASSUMED if first is None or first.device.type != "cuda" else of_device(first.device)


def of_device(device: Any) -> DeviceAnswers:
    """The answers of a CUDA device, such as ``"cuda:0"``; nothing is left on it but that CUDA is started."""
    with torch.cuda.device(device):
        return DeviceAnswers(_workspace(torch.cuda.get_device_properties(device)), _attention(device))


def _workspace(properties: Any) -> int:
    ask: Any = getattr(torch.backends.cuda, "cublas_workspace_size", None)  # torch 2.13
    if ask is not None:
        return int(ask())
    written = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if written:
        return sum(int(kibibytes) * 1024 * int(count) for kibibytes, count in written)
    if torch.version.hip:
        is_instinct = str(getattr(properties, "gcnArchName", "")).startswith(("gfx94", "gfx95"))
        return _ON_INSTINCT if is_instinct else HOPPER_WORKSPACE
    return HOPPER_WORKSPACE if (properties.major, properties.minor) == (9, 0) else AMPERE_WORKSPACE


def _attention(device: Any) -> Attention:
    """The kernel that torch chooses here for causal attention in bfloat16, heads of 64 numbers."""
    query = torch.empty(1, 2, 16, 64, dtype=torch.bfloat16, device=device)
    choose: Any = torch._fused_sdp_choice
    chosen = int(choose(query, query, query, is_causal=True))
    return ATTENTION_KERNELS[chosen] if chosen < len(ATTENTION_KERNELS) else ASSUMED.attention
