"""A live model with LoRA adapters, as facts. Looks only: nothing is run and nothing is changed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import nn

from pytest_lora.facts.model import ModelFacts, SavedModule, TrainableBase, TrainedRows
from pytest_lora.facts.model_parts import LayerState, Wrappers
from pytest_lora.inspection import transformers_internals
from pytest_lora.inspection.adapters_beside import (
    colliding_names,
    combined_adapters,
    equal_adapters,
    shared_adapters,
)
from pytest_lora.inspection.base import BaseParameter, base_facts, base_parameters, dtype_name
from pytest_lora.inspection.base_values import initial_rows, read_base
from pytest_lora.inspection.config import live_config_facts
from pytest_lora.inspection.fsdp_internals import whole_parameters
from pytest_lora.inspection.layers import UNREAD, layer_states, read_values
from pytest_lora.inspection.parameters import count
from pytest_lora.inspection.peft_internals import (
    WRAPPERS,
    ModulesToSaveWrapper,
    active_adapters,
    adapter_names,
    custom_classes,
    lora_configs,
    token_rows,
    trains_xlora,
)
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.inspection.survey import Survey, every_module, outermost_peft, survey
from pytest_lora.inspection.wrappers import wrapper_facts

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def adapted_survey(model: nn.Module, name: str = "model") -> Survey:
    """Survey a model that must carry LoRA layers; errors call it by this name.

    Raises:
        TypeError: It is no module, or has no LoRA layers or none that hold an adapter; the message says so.
    """
    found = survey(model)
    if not found.lora:
        given = type(model).__name__
        other = (
            f", but layers of another PEFT method on {found.other_tuners[0]}" if found.other_tuners else ""
        )
        raise TypeError(
            f"{name} must carry LoRA layers, but this {given} has none{other}; "
            "make them with peft.get_peft_model(base, LoraConfig(...))"
        )
    if not any(map(adapter_names, found.lora.values())):
        raise TypeError(
            f"{name} must carry an adapter, but its LoRA layers hold none any more; add or load one"
        )
    return found


@leaves_no_trace
def model_facts(model: nn.Module) -> ModelFacts:
    """Everything that the rules ask about a live model.

    Raises:
        TypeError: ``model`` carries no LoRA layers, and PEFT has no LoRA configuration for it either.
    """
    found = survey(model)
    if not found.lora and not _is_unloaded(model, found):
        found = adapted_survey(model)
    modules = tuple(every_module(model))
    wrapped = wrapper_facts(model, modules, found)
    with whole_parameters(modules):
        return _facts(model, found, wrapped)


def _facts(model: nn.Module, found: Survey, wrapped: Wrappers) -> ModelFacts:
    parameters = base_parameters(found)
    base = base_facts(found, parameters)
    configs = lora_configs(found.root)
    rslora = frozenset(name for name, config in configs.items() if config.use_rslora)
    registered = frozenset[type]().union(*map(custom_classes, configs.values()))
    layers = tuple(layer_states(found.layers, rslora, registered))
    by_adapter: dict[str, list[LayerState]] = {}
    for layer in layers:
        by_adapter.setdefault(layer.adapter, []).append(layer)
    counted = count(model, found, parameters)
    values = read_base(parameters, base.input_embeddings)
    return ModelFacts(
        base=base,
        configs=tuple(
            live_config_facts(name, configs[name], found, base, tuple(own))
            for name, own in by_adapter.items()
            if name in configs
        ),
        layers=layers,
        saved=tuple(_saved_modules(found, base.tied, {*configs, *by_adapter})),
        rows=tuple(_trained_rows(found)),
        trainable_base=tuple(_trainable_base(parameters, _trained_biases(configs.values(), layers))),
        nonfinite_base=values.nonfinite,
        inference_base=tuple(p.full_name for p in parameters if p.tensor.is_inference()),
        adapters=tuple(by_adapter),
        active=tuple(dict.fromkeys(layer.adapter for layer in layers if layer.active)),
        nested=found.nested,
        training=model.training,
        base_dropouts=tuple(_live_dropouts(found.modules)),
        trainable_parameters=counted.trainable,
        total_parameters=counted.total,
        stored_parameters=counted.stored,
        duplicates=equal_adapters(found.lora),
        reentrant_without_inputs=transformers_internals.reentrant_without_inputs(found),
        wrappers=wrapped,
        colliding=tuple(colliding_names(model, found)),
        trains_xlora=bool(found.lora) and trains_xlora(model),
        initial_rows=tuple(initial_rows(found, base)),
        shared=shared_adapters(found.lora),
        combined=tuple(combined_adapters(found.lora, configs)),
        zero_base=values.zero,
        active_elsewhere=_active_elsewhere(model, layers),
    )


def carries_lora(model: nn.Module) -> bool:
    """Whether a model was made for LoRA: it has LoRA layers, or is a PEFT model whose LoRA layers were taken off."""
    found = survey(model)
    return bool(found.lora) or _is_unloaded(model, found)


def _is_unloaded(model: nn.Module, found: Survey) -> bool:
    """Whether a PEFT model is left that was made for LoRA, but whose LoRA layers were taken off."""
    wrappers = (module for module in model.modules() if isinstance(module, WRAPPERS))
    return not found.other_tuners and any(map(lora_configs, wrappers))


def _active_elsewhere(model: nn.Module, layers: tuple[LayerState, ...]) -> tuple[str, ...] | None:
    """What the PEFT model calls active where it has no such adapter, or none while its layers apply one; else None."""
    wrapper: Any = outermost_peft(model)
    if wrapper is None or not layers:
        return None
    named: str | list[str] = wrapper.active_adapter
    called = [named] if isinstance(named, str) else list(named)
    unknown = tuple(name for name in called if name not in wrapper.peft_config)
    return unknown if unknown or (not called and any(layer.active for layer in layers)) else None


def _trained_biases(configs: Iterable[object], layers: tuple[LayerState, ...]) -> frozenset[str] | None:
    """Modules whose bias a configuration trains on purpose; None where it is every module."""
    modes = {getattr(config, "bias", "none") for config in configs}
    if "all" in modes:
        return None
    return frozenset(layer.module for layer in layers) if "lora_only" in modes else frozenset()


def _trainable_base(
    parameters: tuple[BaseParameter, ...], biases: frozenset[str] | None
) -> Iterator[TrainableBase]:
    for parameter in parameters:
        if parameter.tensor.requires_grad:
            meant = parameter.name == "bias" and (biases is None or parameter.module in biases)
            if not meant:
                yield TrainableBase(parameter.full_name, parameter.numbers)


def _saved_modules(
    found: Survey, tied: tuple[tuple[str, ...], ...], known: Container[str]
) -> Iterator[SavedModule]:
    for module, wrapper in found.saved.items():
        partners = tuple(n for group in tied if module in group for n in group if n != module)
        for adapter, copied in wrapper.modules_to_save.items():
            parameters = list(copied.parameters())
            values = read_values(parameters)
            pairs = list(zip(parameters, wrapper.original_module.parameters(), strict=False))
            differing = [pair for pair in pairs if pair[0].shape != pair[1].shape]
            shown = (differing or pairs)[:1]
            yield SavedModule(
                module=module,
                adapter=adapter,
                trainable=all(p.requires_grad for p in parameters),
                finite=_all_finite(values.get(id(p), UNREAD).finite for p in parameters),
                shape=tuple(n for own, _ in shown for n in own.shape),
                original_shape=tuple(n for _, old in shown for n in old.shape),
                dtype="".join(dtype_name(own.dtype) for own, _ in shown),
                active=adapter in active_adapters(wrapper) and not wrapper.disable_adapters,
                disabled=bool(wrapper.disable_adapters),
                tied=tuple(n for n in partners if not _shares(found, n, adapter, copied)),
                tied_by_loading=transformers_internals.TIES_WHAT_DIFFERS,
                is_orphaned=adapter not in known,
            )


def _trained_rows(found: Survey) -> Iterator[TrainedRows]:
    for module, wrapper in found.tokens.items():
        rows = token_rows(wrapper)
        values = read_values(rows.values())
        for adapter, tensor in rows.items():
            yield TrainedRows(
                module=module,
                adapter=adapter,
                rows=tensor.shape[0],
                trainable=tensor.requires_grad,
                finite=values.get(id(tensor), UNREAD).finite,
                dtype=dtype_name(tensor.dtype),
                active=adapter in active_adapters(wrapper) and not wrapper.disable_adapters,
            )


def _live_dropouts(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Modules in training mode that drop something: dropout layers, and attention that drops its weights."""
    for name, module in modules.items():
        if module.training:
            p = module.p if isinstance(module, _DROPOUTS) else vars(module).get("attention_dropout")
            if isinstance(p, float) and p > 0:
                yield name


def _all_finite(verdicts: Iterable[bool | None]) -> bool | None:
    known = list(verdicts)
    return False if False in known else None if None in known else True


def _shares(found: Survey, partner: str, adapter: str, copied: nn.Module) -> bool:
    """Whether the partner module's own trained copy still shares this copy's weight."""
    wrapper = found.saved.get(partner)
    if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
        return False
    other = wrapper.modules_to_save[adapter]
    return getattr(other, "weight", None) is getattr(copied, "weight", other)
