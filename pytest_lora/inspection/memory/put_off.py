"""What PEFT puts off until a layer has values, done for a model on the meta device: a step finds it there."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

_LEFT_TO_CUT = "_lora_kasa_truncation_deferred"
"""Where KaSA notes base weights that it cuts at the first forward (``peft.tuners.lora.variants``)."""

_MONTECLORA = "_lora_monteclora_config"
"""Where a layer keeps the configurations of MonteCLoRA by adapter, whose samplers it makes at the first forward."""


def finish(model: nn.Module) -> None:
    """Take base weights as cut, and give layers their samplers."""
    for module in model.modules():
        getattr(module, _LEFT_TO_CUT, set()).clear()
        for adapter, config in getattr(module, _MONTECLORA, {}).items():
            samplers: Any = module.lora_monteclora_sampler
            if adapter not in samplers:
                samplers[adapter] = _sampler(module, adapter, config)


def _sampler(layer: Any, adapter: str, config: Any) -> nn.Module:
    """A sampler with all that it holds: noise is drawn for ``buffer_size`` steps at once, and kept.

    One of a single step is made with values, as drawing asks for them; the whole buffer then stands on the meta device.
    The noise has the dtype of the base, where that is not packed; PEFT casts no more than the parameters afterwards.
    """
    variant: Any = importlib.import_module("peft.tuners.lora.monteclora")
    factor = layer.lora_A[adapter].weight
    base = layer.get_base_layer().weight.dtype
    made: Any = variant.MontecloraSampler(
        layer.in_features,
        factor.shape[0],
        **{**asdict(config), "buffer_size": 1},
        device="cpu",
        dtype=base if base.is_floating_point else torch.float32,
    )
    for parameter in made.parameters():
        parameter.data = parameter.data.to(factor.dtype)
    made.to("meta")
    drawn = {}
    for name, tensor in made.sampler.buffer[0].items():
        held = torch.empty(config.buffer_size, *tensor.shape, dtype=tensor.dtype, device="meta")
        made.register_buffer(f"drawn_{name}", held, persistent=False)
        drawn[name] = held[0]
    made.sampler.get = lambda: drawn
    sampler: nn.Module = made
    return sampler
