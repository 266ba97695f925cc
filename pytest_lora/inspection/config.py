"""A LoraConfig on a base, as facts: PEFT is asked on a skeleton, or read from a live model."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.base import BaseFacts, heads_named_by_peft
from pytest_lora.facts.config import NOT_TRIED, ConfigFacts, LayerFacts, NameMatch, PatternKey, Refusal
from pytest_lora.facts.settings import Settings, is_named
from pytest_lora.inspection.base import base_facts, base_parameters
from pytest_lora.inspection.layers import layer_facts
from pytest_lora.inspection.limited.patterns import patterns_kept, unmatchable
from pytest_lora.inspection.peft_internals import (
    LoraConfig,
    LoraLayer,
    adapter_names,
    heads_by_task_type,
    lora_configs,
    token_rows,
)
from pytest_lora.inspection.quiet import collector
from pytest_lora.inspection.rehearsal import refused_initialisation, refused_merge, without_values
from pytest_lora.inspection.repairs import explained, repairs
from pytest_lora.inspection.skeleton import resolve_base, skeleton
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.inspection.survey import Survey, survey
from pytest_lora.patterns import deciding_key, is_expression, matches

ADAPTER = "default"

MOST_ALONE = 50
"""Names that match nothing for which similar ones are looked for: that takes a third of a millisecond each."""

_LONGEST_MISSPELT = 1000
"""Characters from which on a name is none that was mistyped, and would take long to compare."""


@leaves_no_trace
@collector.paused()
def config_facts(config: LoraConfig, base: Any) -> ConfigFacts:
    """Ask PEFT on a skeleton what a configuration does to a base.

    Raises:
        TypeError: ``config`` is no ``LoraConfig``, or ``base`` is nothing that a base can be made of.
        ValueError: ``base`` cannot be built.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, not {type(config).__name__}")
    settings = Settings.of(config)
    model = resolve_base(base, settings.task_type, settings.modules_to_save)
    found = survey(model)
    facts = base_facts(found, base_parameters(found))
    if any(_leaves(facts, head) for head in heads_by_task_type(settings.task_type)):
        settings = _without_absent_heads(settings, facts)
    if why := unmatchable(vars(config), found.modules):
        plain = settings.without_patterns()
        return assembled(ADAPTER, plain, plain, facts, Survey(model, 0), (), Refusal(NOT_TRIED, why))
    if facts.carries_adapter:
        wrapped = refused(_refused_beside(config, found)) or Refusal(
            "", "the base already carries an adapter"
        )
        return assembled(ADAPTER, settings, settings, facts, Survey(model, 0), (), wrapped)
    tried = copy.deepcopy(config)
    if not isinstance(base, nn.Module):
        without_values(tried)  # what a preparation leaves on layers, nothing but a model can have
    injected, error = dry_run(tried, skeleton(model))
    after = found if injected is None else survey(injected)
    layers = tuple(layer_facts(after.layers, ADAPTER))
    ranked = with_ranks(after, ADAPTER)
    refusal = refused(error or refused_initialisation(config, ranked))
    if refusal is not None and injected is None:
        refusal = explained(refusal, config, found.modules, lambda other: dry_run(other, skeleton(model))[1])
    applied = Settings.of(tried)
    made = assembled(ADAPTER, settings, applied, facts, after, layers, refusal)
    taken = None if injected is None else applied
    return replace(made, merge_refusal=refused(refused_merge(config, ranked)), applied=taken)


def _refused_beside(config: LoraConfig, found: Survey) -> Exception | None:
    """What PEFT raises when a configuration becomes one more adapter of a model; None where it takes it."""
    known = lora_configs(found.root)
    name = "_".join((ADAPTER, *known))
    model: Any = None
    for adapter, own in known.items():
        model, error = dry_run(copy.deepcopy(own), skeleton(found.root) if model is None else model, adapter)
        if error is not None:
            return None
    return None if model is None else dry_run(copy.deepcopy(config), model, name)[1]


def refused(error: Exception | None) -> Refusal | None:
    """An error of PEFT as a fact."""
    return None if error is None else Refusal(type(error).__name__, str(error))


def with_ranks(found: Survey, adapter: str) -> list[tuple[LoraLayer, int]]:
    """The layers of an adapter, each with its rank there."""
    return [(layer, int(layer.r[adapter])) for _, layer in found.layers if adapter in adapter_names(layer)]


def dry_run(
    config: LoraConfig, model: nn.Module, adapter: str = ADAPTER
) -> tuple[nn.Module | None, Exception | None]:
    """Let PEFT put an adapter on a skeleton, or beside those on it; ``config`` is changed as PEFT changes it."""
    from peft import PeftModel, get_peft_model

    if not _lacks_preparation(str(config.init_lora_weights).lower(), model):
        without_values(config)
    config.inference_mode, inference = False, config.inference_mode
    try:
        # The factors of an embedding are drawn before they go to the meta device.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), patterns_kept():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.add_adapter(adapter, config, low_cpu_mem_usage=True)
                return model, None
            return get_peft_model(model, config, adapter, low_cpu_mem_usage=True), None
    except Exception as error:
        return None, error
    finally:
        config.inference_mode = inference


def _lacks_preparation(init: str, model: nn.Module) -> bool:
    """Whether PEFT will ask for ``preprocess_corda``, which leaves its results on the layers."""
    return init.startswith("corda") and not any("eigens" in vars(module) for module in model.modules())


def live_config_facts(
    adapter: str, config: LoraConfig, found: Survey, base: BaseFacts, layers: tuple[LayerFacts, ...]
) -> ConfigFacts:
    """Read the configuration of an adapter that a live model already carries."""
    settings = _without_absent_heads(Settings.of(config), base)
    made = assembled(adapter, settings, settings, base, found, layers, None, live=True)
    return replace(made, merge_refusal=refused(refused_merge(config, with_ranks(found, adapter))))


def _without_absent_heads(settings: Settings, base: BaseFacts) -> Settings:
    """Leave out of ``modules_to_save`` what PEFT adds for the task type by itself and this base does not have."""
    named = settings.modules_to_save
    absent = {name for name in named if not _leaves(base, name)}
    absent &= heads_named_by_peft(settings.task_type, named, absent)
    return replace(settings, modules_to_save=tuple(name for name in named if name not in absent))


def _leaves(base: BaseFacts, name: str) -> bool:
    return any(is_named(module, name) for module in base.module_names)


def assembled(
    adapter: str,
    written: Settings,
    applied: Settings,
    base: BaseFacts,
    found: Survey,
    layers: tuple[LayerFacts, ...],
    refusal: Refusal | None,
    live: bool = False,
) -> ConfigFacts:
    """Put together what a configuration means on a base; ``applied`` is what PEFT made of it."""
    names = tuple(_name_matches(written, applied, base, layers, _parameter_names(found)))
    return ConfigFacts(
        adapter=adapter,
        settings=written,
        base=base,
        layers=layers,
        names=names,
        patterns=() if refusal else tuple(_pattern_keys(written, applied, base, layers)),
        saved_modules=tuple(
            name for name, wrapper in found.saved.items() if adapter in wrapper.modules_to_save
        ),
        token_modules=tuple(n for n, wrapper in found.tokens.items() if adapter in token_rows(wrapper)),
        refusal=refusal,
        live=live,
        repairs=repairs(written, names, base, refused=refusal is not None),
    )


def _name_matches(
    written: Settings,
    applied: Settings,
    base: BaseFacts,
    layers: tuple[LayerFacts, ...],
    parameters: list[str],
) -> Iterator[NameMatch]:
    lists = {
        "target_modules": written.target_modules,
        "exclude_modules": written.exclude_modules,
        "modules_to_save": written.modules_to_save,
        "target_parameters": written.target_parameters,
    }
    adapted = [layer.module for layer in layers]
    made = set(applied.target_parameters) - set(written.target_parameters)
    rewritten = set(applied.target_parameters) != set(written.target_parameters)
    fused = tuple(module for module in adapted if any(is_named(module, name) for name in made))
    wanted = {name for names in lists.values() if names and not isinstance(names, str) for name in names}
    by_suffix = _by_suffix(dict.fromkeys([*base.module_names, *adapted]), wanted)
    parameters_by_suffix = _by_suffix(dict.fromkeys(parameters), set(written.target_parameters))
    leaves = sorted({module.leaf for module in base.modules if not module.leaf.isdigit()})
    alone = 0
    for field, names in lists.items():
        if isinstance(names, str):
            yield NameMatch(field, names, tuple(_matched_by_pattern(names, base, adapted)))
            continue
        for name in names or ():
            # PEFT maps names of modules that transformers has since fused to their parameters.
            if rewritten and name not in (getattr(applied, field) or ()):
                if fused:
                    yield NameMatch(field, name, fused)
                continue
            modules = tuple(by_suffix.get(name, ()))
            if field == "target_parameters":
                modules = tuple(dict.fromkeys((*modules, *parameters_by_suffix.get(name, ()))))
            if field == "modules_to_save" and not modules:
                modules = _saved_by_ending(name, base)
            similar = _similar(name, leaves) if not modules and alone < MOST_ALONE else ()
            alone += not modules
            yield NameMatch(field, name, modules, similar)


def _saved_by_ending(name: str, base: BaseFacts) -> tuple[str, ...]:
    """For ``modules_to_save`` PEFT asks for the end of the text alone: "layernorm" means every input_layernorm."""
    return tuple(module for module in base.module_names if len(name) > 1 and module.endswith(name))


def _similar(name: str, leaves: list[str]) -> tuple[str, ...]:
    if len(name) >= _LONGEST_MISSPELT:
        return ()
    return tuple(difflib.get_close_matches(name.rpartition(".")[2], leaves, cutoff=0.7))


def _parameter_names(found: Survey) -> list[str]:
    own = ((name, module.named_parameters(recurse=False)) for name, module in found.modules.items())
    return [f"{name}.{parameter}" for name, parameters in own for parameter, _ in parameters]


def _by_suffix(names: dict[str, None], wanted: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    depths = {name.count(".") + 1 for name in wanted}
    for name in names:
        parts = name.split(".")
        for depth in depths:
            suffix = ".".join(parts[-depth:])
            if suffix in wanted and depth <= len(parts):
                found.setdefault(suffix, []).append(name)
    return found


def _matched_by_pattern(pattern: str, base: BaseFacts, adapted: list[str]) -> Iterator[str]:
    if pattern == "all-linear":
        yield from adapted or (module.name for module in base.modules if module.is_linear)
        return
    yield from (name for name in base.module_names if matches(pattern, name))


def _pattern_keys(
    written: Settings, applied: Settings, base: BaseFacts, layers: tuple[LayerFacts, ...]
) -> Iterator[PatternKey]:
    adapted = [layer.module for layer in layers]
    others = [m.name for m in base.modules if m.name not in set(adapted)]
    for field in ("rank_pattern", "alpha_pattern"):
        pairs: tuple[tuple[str, float], ...] = getattr(written, field)
        kept = dict(getattr(applied, field))
        keys = [key for key, _ in pairs if key in kept]
        if not keys:
            continue
        deciding: dict[str | None, list[str]] = {}
        for module in adapted:
            deciding.setdefault(deciding_key(keys, module), []).append(module)
        for key, value in pairs:
            if key not in kept:
                continue
            decides = tuple(deciding.get(key, ()))
            own = () if decides else tuple(m for m in adapted if deciding_key([key], m))
            shadow = deciding_key(keys, own[0]) if own else None
            elsewhere = () if decides or own else tuple(m for m in others if deciding_key([key], m))
            ending = key.lstrip("^")
            saved = {m: deciding_key(sorted(keys), m) for m in decides} if keys != sorted(keys) else {}
            taken = tuple(m for m, other in saved.items() if other is not None and kept[other] != kept[key])
            yield PatternKey(
                field,
                key,
                float(value),
                decides,
                shadow,
                elsewhere,
                own,
                is_expression(key),
                not decides and ending != key and any(deciding_key([ending], m) for m in adapted),
                taken,
                saved[taken[0]] if taken else None,
            )
