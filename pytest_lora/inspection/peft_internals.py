"""What PEFT does not document as public is touched here and in ``peft_state``, and nowhere else."""

from __future__ import annotations

from inspect import ismethod
from typing import TYPE_CHECKING, Any, NamedTuple

import peft
from packaging.version import Version
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.xlora import XLoraModel
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from pytest_lora.facts.base import HEADS_BY_TASK_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import Tensor, nn

WRAPPERS = (PeftModel, PeftMixedModel)

SVD_SCALES_TWICE = Version(peft.__version__) < Version("0.21")
"""Whether ``add_weighted_adapter(..., combination_type="svd")`` multiplies by ``alpha / r`` once too often."""

__all__ = [
    "SVD_SCALES_TWICE",
    "WRAPPERS",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "active_adapters",
    "adapted_weight",
    "adapter_names",
    "custom_classes",
    "delta_weight",
    "dense_weight",
    "factors",
    "forget_adapters",
    "freeze",
    "frozen_factors",
    "further_tensors",
    "fused_parameter",
    "groups_of",
    "heads_by_task_type",
    "held_layer",
    "is_adalora",
    "lora_configs",
    "own_code",
    "own_geometry",
    "store_adapter",
    "token_rows",
    "trains_xlora",
    "wrapped_base",
    "xlora_models",
]


class Factors(NamedTuple):
    """The two low-rank factors; ``b`` is the one that the default initialisation sets to zero."""

    a_name: str
    a: Tensor
    b_name: str
    b: Tensor
    frozen_by_design: tuple[str, ...]


def wrapped_base(model: nn.Module) -> nn.Module | None:
    """The model that a PEFT wrapper or tuner holds; None if ``model`` is neither."""
    if isinstance(model, WRAPPERS):
        inner: nn.Module = model.base_model
        return inner.model if isinstance(inner, BaseTuner) else inner
    return model.model if isinstance(model, BaseTuner) else None


def lora_configs(base: nn.Module) -> dict[str, LoraConfig]:
    """The LoRA configurations that PEFT leaves on the model it injected into, by adapter name."""
    configs = getattr(base, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    return {name: c for name, c in configs.items() if isinstance(c, LoraConfig)}


def forget_adapters(base: nn.Module) -> None:
    """Take off a base what PEFT and transformers note on it of adapters that are gone.

    ``unload`` of PEFT before 0.19 leaves it there, and an adapter of a name that is noted is not loaded later.
    """
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(base).pop(attribute, None)


def held_layer(layer: BaseTunerLayer) -> nn.Module:
    """What an adapter layer wraps, which in a mixed model may be an adapter layer itself."""
    wrapping: Any = layer
    held: nn.Module = wrapping.base_layer
    return held


def adapter_names(layer: LoraLayer) -> tuple[str, ...]:
    """Adapters on one LoRA layer, in the order they were added; AdaLoRA may have taken every rank of one away."""
    return tuple(name for name, rank in layer.r.items() if rank)


def active_adapters(
    layer: BaseTunerLayer | ModulesToSaveWrapper | TrainableTokensWrapper,
) -> tuple[str, ...]:
    """Adapters that take part in the forward pass of one layer."""
    active: str | Iterable[str] = layer.active_adapter
    return (active,) if isinstance(active, str) else tuple(active)


def factors(layer: LoraLayer, adapter: str) -> Factors:
    """The tensors of one adapter on one layer."""
    by_design = tuple(getattr(layer, "frozen_peft_weight_names", {}).get(adapter, ()))
    singular_values: Any = getattr(layer, "lora_E", {})
    if adapter in singular_values:
        # AdaLoRA's product is B diag(E) A, and E is what starts at zero.
        return Factors(
            "lora_A", _weight(layer.lora_A[adapter]), "lora_E", singular_values[adapter], by_design
        )
    if adapter in layer.lora_A:
        a, b = _weight(layer.lora_A[adapter]), _weight(layer.lora_B[adapter])
        return Factors("lora_A", a, "lora_B", b, by_design)
    a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return Factors("lora_embedding_B", b, "lora_embedding_A", a, by_design)


def _weight(factor: Any) -> Tensor:
    """A factor's tensor: PEFT keeps it in a module, AdaLoRA as it is."""
    weight: Tensor = getattr(factor, "weight", factor)
    return weight


def further_tensors(layer: LoraLayer, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """What a variant of LoRA trains on a layer beside the two factors, by its name in PEFT.

    The magnitude of DoRA, the diagonal of KaSA, the left singular vectors of AdaLoRA, a bias of ``lora_B``.
    """
    beside = layer.lora_bias.get(adapter) or is_adalora(layer)
    for name in dict.fromkeys(layer.adapter_layer_names):  # PEFT 0.21 has the magnitude of DoRA there twice
        if name in _FACTORS and not (beside and name == "lora_B"):
            continue
        held: Any = getattr(layer, name, None)
        if not held or adapter not in held:
            continue
        part = held[adapter]
        named = part.named_parameters() if hasattr(part, "named_parameters") else [("weight", part)]
        for own, tensor in named:
            if own != "weight" or name != "lora_B" or is_adalora(layer):
                yield name if own == "weight" else f"{name}.{own}", tensor


_FACTORS = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")


def fused_parameter(layer: LoraLayer) -> tuple[str, int] | None:
    """Name and number of stacked experts where the layer adapts a bare parameter, else None."""
    name: Any = getattr(layer, "parameter_name", None)
    return None if name is None else (str(name), int(getattr(layer, "num_experts", 1)))


def adapted_weight(layer: LoraLayer) -> Tensor | None:
    """The parameter of the base that a layer adapts, as it is stored; None where there is no single one."""
    base: nn.Module = layer.get_base_layer()
    fused = fused_parameter(layer)
    for name in (fused[0],) if fused else ("weight", "in_proj_weight"):
        weight: Tensor | None = getattr(base, name, None)
        if weight is not None:
            return weight
    return None


def dense_weight(layer: LoraLayer) -> Tensor | None:
    """That weight as numbers, unpacked where it is quantized; None where that cannot be done."""
    weight = adapted_weight(layer)
    if weight is None or weight.device.type == "meta":
        return None
    if weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
        return weight.detach()
    try:
        dense: Tensor = dequantize_module_weight(layer.get_base_layer())
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None
    return dense.detach()


def delta_weight(layer: LoraLayer, adapter: str) -> Tensor:
    """What an adapter adds to the base weight, in the base weight's form; without the magnitude of DoRA."""
    kind: Any = layer  # each kind of layer has the method, their common class has not
    delta: Tensor = kind.get_delta_weight(adapter)
    return delta


def own_geometry(layer: LoraLayer, adapter: str) -> bool:
    """Whether a LoRA variant other than DoRA gives the factors shapes of its own (QALoRA, BD-LoRA, ...)."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    return is_adalora(layer) or (variant is not None and "Dora" not in type(variant).__name__)


def trains_xlora(model: nn.Module) -> bool:
    """Whether X-LoRA's classifier, which weighs its frozen adapters token by token, requires gradients."""
    classifiers: list[Any] = [mixture.internal_xlora_classifier for mixture in xlora_models(model)]
    return any(p.requires_grad for classifier in classifiers for p in classifier.parameters())


def xlora_models(model: nn.Module) -> list[Any]:
    """The tuner of X-LoRA in a model, if it has one."""
    outer: Any = next((module for module in model.modules() if isinstance(module, WRAPPERS)), None)
    tuner = getattr(outer, "base_model", None)
    return [tuner] if isinstance(tuner, XLoraModel) else []


def groups_of(layer: LoraLayer) -> int:
    """Groups of the convolution that a layer adapts; 1 for any other module."""
    groups: int = getattr(layer.get_base_layer(), "groups", 1)
    return groups


def is_adalora(layer: LoraLayer) -> bool:
    """Whether a layer is AdaLoRA's, which divides its scaling, lora_alpha itself, by the rank."""
    return isinstance(layer, AdaLoraLayer)


def own_code(layer: LoraLayer) -> str:
    """What is not PEFT's about a layer: its class, or the ``forward`` of this instance; empty if nothing is.

    X-LoRA replaces ``forward`` by a method of PEFT's own, and the hooks of accelerate, which move weights to where they
    are needed, by one that calls the old one.
    """
    made: type = type(layer)
    if made.__module__.partition(".")[0] != "peft":
        return f"class {made.__module__}.{made.__qualname__}"
    forward = vars(layer).get("forward")
    is_pefts = ismethod(forward) and type(forward.__self__).__module__.partition(".")[0] == "peft"
    return "" if forward is None or is_pefts or "_hf_hook" in vars(layer) else "forward"


def custom_classes(config: LoraConfig) -> frozenset[type]:
    """Classes of layers that a configuration registers for modules of its own (``_register_custom_module``)."""
    return frozenset((getattr(config, "_custom_modules", None) or {}).values())


def store_adapter(model: nn.Module, dtype: torch.dtype, *, magnitudes: bool) -> None:
    """Keep the factors of all adapters of a model in a dtype, and the magnitudes of DoRA too, or as they are.

    Whole copies of layers stay as they are.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, parameter in layer.named_parameters():
            kept = name.startswith("lora_magnitude_vector") and not magnitudes
            if parameter.is_floating_point() and name.startswith("lora_") and not kept:
                parameter.data = parameter.data.to(dtype)


def freeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Freeze parameters of adapters: of every layer by a part of their name, or by whole names in the base."""
    for name, parameter in model.named_parameters():
        if any(f".{frozen}." in f".{name}." for frozen in names):
            parameter.requires_grad_(False)


def frozen_factors(model: nn.Module) -> tuple[str, ...]:
    """What ``freeze`` takes to freeze what is frozen of the active adapters in a model."""
    trained: dict[str, list[str]] = {}
    frozen: dict[str, list[str]] = {}
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for layer_name, layer in layers:
        for name, parameter in layer.named_parameters():
            kind, _, rest = name.partition(".")
            if kind.startswith("lora_") and rest.split(".")[0] in layer.active_adapters:
                kinds = trained if parameter.requires_grad else frozen
                kinds.setdefault(kind, []).append(f"{layer_name}.{kind}")
    whole = [kind for kind in frozen if kind not in trained]
    return (*whole, *(name for kind, names in frozen.items() if kind in trained for name in names))


def token_rows(wrapper: TrainableTokensWrapper) -> dict[str, Tensor]:
    """The trainable rows of an embedding, by adapter."""
    return dict(wrapper.token_adapter.trainable_tokens_delta.items())


def heads_by_task_type(task_type: str | None) -> tuple[str, ...]:
    """Names that PEFT adds to ``modules_to_save`` by itself for this task type."""
    return HEADS_BY_TASK_TYPE.get(task_type or "", ())
