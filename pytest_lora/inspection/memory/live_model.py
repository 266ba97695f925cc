"""What decides a step's memory, read from the live model: its settings, and what its GPU answers."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from pytest_lora.facts.memory import AMPERE_WORKSPACE, Quantization, StepSetting, Unmodelled
from pytest_lora.facts.memory_choices import ATTENTION_KERNELS, Attention
from pytest_lora.inspection.base import dtype_name
from pytest_lora.inspection.bitsandbytes_internals import quantized_layers
from pytest_lora.inspection.peft_internals import LoraConfig, frozen_factors, lora_configs
from pytest_lora.inspection.survey import survey

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


class Described(NamedTuple):
    """What an estimate needs to know of a live model."""

    base: Any
    config: LoraConfig
    setting: StepSetting


def described(model: nn.Module, batch_size: int, seq_len: int) -> Described | None:
    """A live model's configuration, its adapter, and how it is stored; None where it has neither."""
    root = survey(model).root
    base: Any = getattr(root, "config", None)
    configs = lora_configs(root)
    if base is None or not configs:
        return None
    config = next(iter(configs.values()))
    packed = quantization_of_model(root)
    dtype = dtype_name(_commonest([p for p in root.parameters() if not p.requires_grad]))
    setting = StepSetting(
        batch_size=batch_size,
        seq_len=seq_len,
        quantization=packed,
        dtype=packed.compute_dtype if packed else dtype,
        adapter_dtype=dtype_name(_commonest([p for p in root.parameters() if p.requires_grad])),
        gradient_checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in root.modules()),
        prepare_for_kbit=packed is not None and dtype == "float32",
        **of_model(root)._asdict(),
        frozen=frozen_factors(root),
    )
    return Described(base, config, setting)


_WRAPPERS = {
    "DistributedDataParallel": Unmodelled("gradient buckets of DistributedDataParallel are", "at least"),
    "FullyShardedDataParallel": Unmodelled("weights cut over several GPUs (FSDP) are", "at most"),
    "FSDPModule": Unmodelled("weights cut over several GPUs (FSDP) are", "at most"),
    "OptimizedModule": Unmodelled("operations that torch.compile fuses are", "at most"),
}


def left_out(model: nn.Module) -> tuple[Unmodelled, ...]:
    """What of a live model no estimate counts: what wraps it."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if any(getattr(module, "_compiled_call_impl", None) for module in model.modules()):
        kinds.add("OptimizedModule")
    return tuple(dict.fromkeys(found for name, found in _WRAPPERS.items() if name in kinds))


def _commonest(parameters: list[nn.Parameter]) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def quantization_of_model(root: nn.Module) -> Quantization | None:
    """How bitsandbytes stores the layers of a live model; None where it stores none."""
    layers: list[Any] = list(quantized_layers(root))
    if not layers:
        return None
    weight = layers[0].weight
    if getattr(weight, "quant_state", None) is None:
        return Quantization("int8", compute_dtype="float16")
    return Quantization(
        weight.quant_type,
        double_quant=bool(weight.compress_statistics),
        storage=dtype_name(weight.quant_storage),
        compute_dtype=dtype_name(layers[0].compute_dtype or torch.float32),
    )
