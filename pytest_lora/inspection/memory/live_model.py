"""The memory settings of a model with an adapter, read from the live model."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from pytest_lora.facts.memory import Quantization, StepSetting, Unmodelled
from pytest_lora.inspection.base import dtype_name
from pytest_lora.inspection.bitsandbytes_internals import quantized_layers
from pytest_lora.inspection.memory.devices import of_model
from pytest_lora.inspection.peft_internals import LoraConfig, frozen_factors, lora_configs
from pytest_lora.inspection.survey import survey


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
