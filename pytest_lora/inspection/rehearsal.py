"""What PEFT refuses of layers that have values, tried on small ones: on the meta device there is nothing to read."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pytest_lora.inspection.base import logical_shape
from pytest_lora.inspection.peft_internals import (
    BaseTunerLayer,
    LoraConfig,
    LoraLayer,
    fused_parameter,
    groups_of,
)

READ_WEIGHTS = ("pissa", "olora", "corda", "loftq", "eva", "orthogonal", "lora_ga", "mica")
"""Initialisations that compute with base weights; they change values only, so that the structure does without."""

_NEED_MORE = ("corda", "loftq")
"""Those that read what a preparation left on the layers, or quantize in blocks of a fixed size."""

_VARIANTS = ("kasa_config", "velora_config", "monteclora_config", "arrow_config", "use_bdlora")
"""Fields of variants that merging may know nothing of (``peft.tuners.lora.variants``)."""

_GRADIENT = "_peft_loraga_grad"
"""Where ``peft.tuners.lora.loraga.preprocess_loraga`` leaves the gradients that LoRA-GA reads."""

_OF_THE_WHOLE_MODEL = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "task_type",
)


def reads_weights(config: LoraConfig) -> bool:
    """Whether PEFT computes with values of the base to make this adapter."""
    return str(config.init_lora_weights).lower().startswith(READ_WEIGHTS)


def without_values(config: LoraConfig) -> None:
    """Take out of a configuration what asks for values and changes no structure."""
    if reads_weights(config):
        config.init_lora_weights = True
    if _sets(config, "velora_config"):
        groups: Any = config.velora_config
        config.velora_config = replace(groups, init_type="batch_average_once")


def refused_initialisation(config: LoraConfig, layers: Iterable[tuple[LoraLayer, int]]) -> Exception | None:
    """What is raised when these layers are initialised and run; None where nothing is, or it cannot be tried.

    Args:
        config: The configuration as written.
        layers: Layers that PEFT made of it on a skeleton, with their ranks.
    """
    by_variant = _sets(config, "kasa_config") or _sets(config, "velora_config")
    if not (by_variant or reads_weights(config)):
        return None
    if str(config.init_lora_weights).lower().startswith(_NEED_MORE):
        return None
    made, run = _tried(config, layers, _run)
    return made or run


def refused_merge(config: LoraConfig, layers: Iterable[tuple[LoraLayer, int]]) -> Exception | None:
    """What PEFT raises when it merges these layers; None where it does not."""
    layers = list(layers)
    for kind in {type(layer) for layer, _ in layers}:
        if kind.merge is BaseTunerLayer.merge:
            return NotImplementedError(f"{kind.__name__} has no merge")
    convolutions = (layer for layer, _ in layers if "Conv" in type(layer).__name__)
    grouped = any(groups_of(layer) != 1 for layer in convolutions)
    fields = ("lora_bias", "alora_invocation_tokens", *_VARIANTS)
    if not (grouped or any(_sets(config, name) for name in fields)):
        return None
    plain = copy.deepcopy(config)
    if reads_weights(plain):
        plain.init_lora_weights = True
    return _tried(plain, layers, _merge)[1]


def _sets(config: LoraConfig, field: str) -> bool:
    return bool(getattr(config, field, None))


def _tried(
    config: LoraConfig,
    layers: Iterable[tuple[LoraLayer, int]],
    use: Callable[[Any, dict[str, nn.Module]], None],
) -> tuple[Exception | None, Exception | None]:
    """What is raised when PEFT makes an adapter for small layers like these, and when that is used."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = dict(_small_layers(layers, whole=_sets(config, "velora_config")))
        named = {f"layer_{number}": module for number, module in enumerate(ranks)}
        base: Any = nn.ModuleDict(named)
        if not named:
            return None, None
        try:
            model = get_peft_model(base, _for_these(config, dict(zip(named, ranks.values(), strict=True))))
        except Exception as error:
            return error, None
        try:
            use(model, named)
        except Exception as error:
            return None, error
    return None, None


def _run(model: Any, named: dict[str, nn.Module]) -> None:
    for name, module in named.items():
        model.base_model.model[name](*_inputs(module))


def _merge(model: Any, named: dict[str, nn.Module]) -> None:
    model.merge_and_unload()


def _for_these(config: LoraConfig, ranks: dict[str, int]) -> Any:
    """The configuration for modules of these names and ranks."""
    tried: Any = copy.deepcopy(config)
    for field in _OF_THE_WHOLE_MODEL:
        if hasattr(tried, field):
            setattr(tried, field, None)
    tried.target_modules = set(ranks)
    tried.bias = "none"
    tried.rank_pattern, tried.alpha_pattern = ranks, {}
    tried.inference_mode = False
    return tried


def _small_layers(layers: Iterable[tuple[LoraLayer, int]], *, whole: bool) -> Iterator[tuple[nn.Module, int]]:
    """One small layer of each kind, with its rank.

    Sizes are cut to one more than the rank, which leaves what is larger than what as it is. LoRA-GA divides twice the
    rank of directions between its factors, so that a layer with a gradient keeps one more than that.
    """
    seen = set()
    for layer, rank in layers:
        base = layer.get_base_layer()
        shape = None if fused_parameter(layer) else logical_shape(base)
        if shape is None:
            continue
        prepared = hasattr(base, _GRADIENT)
        most = (2 if prepared else 1) * rank + 1
        inputs, outputs = shape if whole else (min(size, most) for size in shape)
        biased = any(getattr(base, name, None) is not None for name in ("bias", "in_proj_bias"))
        key = (type(base), inputs, outputs, getattr(base, "groups", None), rank, prepared, biased)
        if key not in seen:
            seen.add(key)
            small = _small(base, inputs, outputs, biased)
            if small is not None:
                if prepared:
                    setattr(small, _GRADIENT, torch.randn(outputs, inputs))
                yield small, rank


def _small(base: nn.Module, inputs: int, outputs: int, biased: bool) -> nn.Module | None:
    if isinstance(base, nn.Embedding):
        return nn.Embedding(inputs, outputs)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        convolution: Any = type(base)
        small: nn.Module = convolution(
            base.groups, base.groups, base.kernel_size, groups=base.groups, bias=biased
        )
        return small
    if isinstance(base, nn.MultiheadAttention):
        width = base.num_heads * math.ceil(inputs / base.num_heads)
        return nn.MultiheadAttention(width, base.num_heads, bias=biased)
    kind: Any = type(base)
    if kind.__name__ == "Conv1D":
        turned: nn.Module = kind(outputs, inputs)
        return turned
    return nn.Linear(inputs, outputs, bias=biased) if isinstance(base, nn.Linear) else None


def _inputs(module: nn.Module) -> tuple[torch.Tensor, ...]:
    """One input that a small layer takes."""
    if isinstance(module, nn.Embedding):
        return (torch.zeros(1, 1, dtype=torch.long),)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return (torch.zeros(1, module.in_channels, *module.kernel_size),)
    inputs, _ = logical_shape(module) or (1, 1)
    return (torch.zeros(1, 1, inputs),) * (3 if isinstance(module, nn.MultiheadAttention) else 1)
